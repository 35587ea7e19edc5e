"""MLX's affine layout, in the widths that it knows.

For a linear layer of K inputs and N outputs with groups of g inputs and codes of b bits:

    weight  uint32 [N, K * b / 32]  codes one behind another in a row, little-endian bit by bit
    scales  float  [N, K / g]
    biases  float  [N, K / g]       -zero * scale

The value is scales * code + biases. MLX's own quantizer also writes offsets that belong to no zero point in
range; such a layer is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awq.config import FORMAT_BITS
from awq.errors import CorruptFileError
from awq.formats.layout import LayerShape, divides, grouped, integer_zeros, refuse, scaled_zeros
from awq.formats.stream import codes_in, pack_stream, unpack_stream
from awq.weight import QuantizedWeight

names = ("scales", "biases", "weight")
optional: tuple[str, ...] = ()
_BITS = FORMAT_BITS["mlx"]
_GROUPS = (32, 64, 128)


def supports(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layer cannot be held, or None when it can."""
    if bits not in _BITS:
        return f"MLX knows {', '.join(map(str, _BITS))} bits, not {bits}"
    if group_size not in _GROUPS:
        return f"MLX knows groups of {', '.join(map(str, _GROUPS))}, not {group_size}"
    return divides(in_features, group_size)


def packed_shapes(
    out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype, bits: int = 4
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor, by suffix."""
    groups = in_features // group_size
    return {
        "weight": (torch.uint32, (out_features, in_features * bits // 32)),
        "scales": (scales_dtype, (out_features, groups)),
        "biases": (scales_dtype, (out_features, groups)),
    }


def measure(shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
    """The layer's measures; the width of a code must be known."""
    out_features, words = shapes["weight"]
    return grouped(out_features, codes_in(words, bits), shapes["scales"][1])


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Pack a weight. The zero points can be told from their products again: see `integer_zeros`.

    Raises:
        ConfigError: the layout cannot hold the weight.
    """
    refuse(supports(weight.out_features, weight.in_features, weight.group_size, weight.bits))
    return {
        "weight": pack_stream(weight.codes, weight.bits).view(torch.uint32),
        "scales": weight.scales.contiguous(),
        "biases": scaled_zeros(weight, weight.scales.dtype),
    }


def unpack(tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None) -> QuantizedWeight:
    """Undo `pack`, exactly (but a zero point with scale 0 comes back as 0).

    Raises:
        CorruptFileError: the tensors do not belong together, or an offset is no zero point.
    """
    codes, scales = unpack_stream(tensors["weight"], bits), tensors["scales"]
    if scales.shape != tensors["biases"].shape:
        raise CorruptFileError(f"{tuple(scales.shape)} scales have {tuple(tensors['biases'].shape)} biases")
    return QuantizedWeight(codes, scales, integer_zeros(tensors["biases"], scales, bits), bits)


def dequantize(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """Values float32 `[N, K]` of any affine weight, whether its offsets are zero points or not."""
    codes, scales = unpack_stream(tensors["weight"], bits), tensors["scales"]
    grouped_codes = codes.view(*scales.shape, -1).float()
    values = grouped_codes * scales.unsqueeze(-1).float() + tensors["biases"].unsqueeze(-1).float()
    return values.view(codes.shape)

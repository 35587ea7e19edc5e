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

from awq.errors import CorruptFileError
from awq.formats.layout import LayerShape, divides, grouped, integer_zeros, refuse, scaled_zeros
from awq.weight import QuantizedWeight

names = ("scales", "biases", "weight")
optional: tuple[str, ...] = ()
_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)


def supports(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layer cannot be held, or None when it can."""
    if bits not in _BITS:
        return f"MLX knows {', '.join(map(str, _BITS))} bits, not {bits}"
    if group_size not in _GROUPS:
        return f"MLX knows groups of {', '.join(map(str, _GROUPS))}, not {group_size}"
    return divides(in_features, group_size)


def packed_shapes(
    out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of 4 bits, by suffix."""
    groups = in_features // group_size
    return {
        "weight": (torch.uint32, (out_features, in_features // 8)),
        "scales": (scales_dtype, (out_features, groups)),
        "biases": (scales_dtype, (out_features, groups)),
    }


def measure(shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
    """The layer's measures; the width of a code must be known."""
    out_features, words = shapes["weight"]
    return grouped(out_features, words * 32 // bits, shapes["scales"][1])


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Pack a weight. The zero points can be told from their products again: see `integer_zeros`.

    Raises:
        ConfigError: the layout cannot hold the weight.
    """
    refuse(supports(weight.out_features, weight.in_features, weight.group_size, weight.bits))
    return {
        "weight": pack_bits(weight.codes, weight.bits),
        "scales": weight.scales.contiguous(),
        "biases": scaled_zeros(weight, weight.scales.dtype),
    }


def unpack(tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None) -> QuantizedWeight:
    """Undo `pack`, exactly (but a zero point with scale 0 comes back as 0).

    Raises:
        CorruptFileError: the tensors do not belong together, or an offset is no zero point.
    """
    codes, scales = unpack_bits(tensors["weight"], bits), tensors["scales"]
    if scales.shape != tensors["biases"].shape:
        raise CorruptFileError(f"{tuple(scales.shape)} scales have {tuple(tensors['biases'].shape)} biases")
    return QuantizedWeight(codes, scales, integer_zeros(tensors["biases"], scales, bits), bits)


def dequantize(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """Values float32 `[N, K]` of any affine weight, whether its offsets are zero points or not."""
    codes, scales = unpack_bits(tensors["weight"], bits), tensors["scales"]
    grouped_codes = codes.view(*scales.shape, -1).float()
    values = grouped_codes * scales.unsqueeze(-1).float() + tensors["biases"].unsqueeze(-1).float()
    return values.view(codes.shape)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `[N, K]` as words uint32 `[N, K * bits / 32]`."""
    places = torch.arange(bits, dtype=torch.uint8)
    stream = ((codes.unsqueeze(-1) >> places) & 1).view(codes.shape[0], -1, 8)
    octets = (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return octets.view(torch.uint32)


def unpack_bits(words: Tensor, bits: int) -> Tensor:
    """Undo `pack_bits`."""
    octets = words.contiguous().view(torch.uint8)
    stream = ((octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).view(words.shape[0], -1, bits)
    return (stream << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)

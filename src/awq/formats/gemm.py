"""AutoAWQ's GEMM layout, the one that vLLM, SGLang, LMDeploy, transformers and mlx-lm read.

For a linear layer of K inputs and N outputs with groups of g inputs:

    qweight  int32   [K, N / 8]      codes, transposed, eight columns to a word
    qzeros   int32   [K / g, N / 8]  zero points in the same way, with no offset
    scales   float16 [K / g, N]      (bfloat16 is allowed)

Nibble i of a word, counted from the low bits, holds column [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight.
Source: AutoAWQ 0.2.9's checkpoints. Its `exllama` checkpoints are the same on disk.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awq.errors import ConfigError
from awq.formats.layout import LayerShape, divides, grouped, pack_nibbles, refuse, unpack_nibbles
from awq.weight import QuantizedWeight

names = ("qweight", "qzeros", "scales")
optional: tuple[str, ...] = ()


def supports(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layer cannot be held, or None when it can."""
    if bits != 4:
        return f"the layout holds 4 bits, not {bits}"
    if out_features % 8:
        return f"{out_features} output channels do not divide by 8"
    return divides(in_features, group_size)


def packed_shapes(
    out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype, bits: int = 4
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor, by suffix."""
    groups = in_features // group_size
    return {
        "qweight": (torch.int32, (in_features, out_features // 8)),
        "qzeros": (torch.int32, (groups, out_features // 8)),
        "scales": (scales_dtype, (groups, out_features)),
    }


def measure(shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
    """The layer's measures; the shapes alone tell them."""
    in_features, words = shapes["qweight"]
    return grouped(words * 8, in_features, shapes["scales"][0])


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Pack a weight.

    Returns:
        `qweight`, `qzeros` int32 and `scales` in the weight's own dtype, shaped as in the module's docstring.

    Raises:
        ConfigError: the layout cannot hold the weight.
    """
    refuse(supports(weight.out_features, weight.in_features, weight.group_size, weight.bits))
    return {
        "qweight": pack_nibbles(weight.codes.t(), even_first=True),
        "qzeros": pack_nibbles(weight.zeros.t(), even_first=True),
        "scales": weight.scales.t().contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None) -> QuantizedWeight:
    """Undo `pack`, exactly.

    Raises:
        ConfigError: the tensors do not belong together.
    """
    if bits != 4:
        raise ConfigError(f"the gemm layout holds 4 bits, not {bits}")
    return QuantizedWeight(
        codes=unpack_nibbles(tensors["qweight"], even_first=True).t().contiguous(),
        scales=tensors["scales"].t().contiguous(),
        zeros=unpack_nibbles(tensors["qzeros"], even_first=True).t().contiguous(),
        bits=4,
    )

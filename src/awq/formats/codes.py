"""One byte for each code: any width up to 8, any shape. No engine's layout, but every one fits into it.

Checkpoints whose width AutoAWQ's layouts cannot hold pass through here when OpenAWQ loads them, and are
written so when they are saved again; `awq convert` takes them to the layouts of engines.

For a linear layer of K inputs and N outputs with groups of g inputs:

    qweight  uint8  [N, K]      codes
    qzeros   uint8  [N, K / g]  zero points
    scales   float  [N, K / g]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awq.formats.layout import LayerShape, divides, grouped, refuse
from awq.weight import QuantizedWeight

names = ("qweight", "qzeros", "scales")
optional: tuple[str, ...] = ()


def supports(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layer cannot be held, or None when it can."""
    if not 2 <= bits <= 8:
        return f"a byte holds a code of 2 to 8 bits, not {bits}"
    return divides(in_features, group_size)


def packed_shapes(
    out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype, bits: int = 4
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor, by suffix."""
    groups = in_features // group_size
    return {
        "qweight": (torch.uint8, (out_features, in_features)),
        "qzeros": (torch.uint8, (out_features, groups)),
        "scales": (scales_dtype, (out_features, groups)),
    }


def measure(shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
    """The layer's measures; the shapes alone tell them."""
    out_features, in_features = shapes["qweight"]
    return grouped(out_features, in_features, shapes["scales"][1])


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The weight's own tensors.

    Raises:
        ConfigError: the groups do not cover the row.
    """
    refuse(supports(weight.out_features, weight.in_features, weight.group_size, weight.bits))
    return {
        "qweight": weight.codes.contiguous(),
        "qzeros": weight.zeros.contiguous(),
        "scales": weight.scales.contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None) -> QuantizedWeight:
    """Undo `pack`."""
    return QuantizedWeight(tensors["qweight"], tensors["scales"], tensors["qzeros"], bits)

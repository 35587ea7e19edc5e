"""Plain weights that hold the quantized values: a research format of any width, read by every loader."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awq.errors import ConfigError
from awq.formats.layout import LayerShape, divides
from awq.weight import QuantizedWeight

names = ("weight",)
optional: tuple[str, ...] = ()


def supports(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layer cannot be held, or None when it can."""
    return divides(in_features, group_size)


def packed_shapes(
    out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype, bits: int = 4
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """One tensor, `weight` `[out_features, in_features]`, in the dtype given."""
    return {"weight": (scales_dtype, (out_features, in_features))}


def measure(shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
    """The layer's measures, with the group size as it is given."""
    out_features, in_features = shapes["weight"]
    return LayerShape(out_features, in_features, in_features if group_size == -1 else group_size)


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The values as float32; the writer casts them to the dtype it planned."""
    return {"weight": weight.dequantize()}


def unpack(tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None) -> QuantizedWeight:
    """Codes cannot be told from plain values.

    Raises:
        ConfigError: always.
    """
    raise ConfigError("a checkpoint of plain weights holds no codes; quantize to `gemm` to keep them")

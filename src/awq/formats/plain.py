"""Plain weights that hold the quantized values: a research format of any width, read by every loader."""

from __future__ import annotations

import torch
from torch import Tensor

from awq.errors import ConfigError
from awq.weight import QuantizedWeight


def supports(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layer cannot be held, or None when it can."""
    if in_features % group_size:
        return f"{in_features} input channels do not divide into groups of {group_size}"
    return None


def packed_shapes(
    out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """One tensor, `weight` `[out_features, in_features]`, in the dtype given."""
    return {"weight": (scales_dtype, (out_features, in_features))}


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The values as float32; the writer casts them to the dtype it planned."""
    return {"weight": weight.dequantize()}


def unpack(tensors: dict[str, Tensor], bits: int = 4) -> QuantizedWeight:
    """Codes cannot be told from plain values.

    Raises:
        ConfigError: always.
    """
    raise ConfigError("a checkpoint of plain weights holds no codes; quantize to `gemm` to keep them")

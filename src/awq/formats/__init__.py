"""On-disk layouts: one file each, every one a pair of pack and unpack around the canonical weight."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from awq.errors import ConfigError
from awq.formats import gemm, plain
from awq.weight import QuantizedWeight

__all__ = ["Layout", "gemm", "get_format", "plain"]


class Layout(Protocol):
    """What each layout offers."""

    def supports(self, out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
        """Why a layer cannot be held, or None when it can."""

    def packed_shapes(
        self, out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor that stands for a layer's weight, by suffix."""

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that stand for a weight, by suffix."""

    def unpack(self, tensors: dict[str, Tensor], bits: int = 4) -> QuantizedWeight:
        """The weight behind such tensors."""


_LAYOUTS: dict[str, Layout] = {"gemm": gemm, "float": plain}


def get_format(name: str) -> Layout:
    """The layout of a name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return _LAYOUTS[name]
    except KeyError:
        raise ConfigError(f"format {name!r} is unknown; known are: {', '.join(_LAYOUTS)}") from None

"""A layer as kernels see it."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Where a layer is, and its measures."""

    device: str
    dtype: torch.dtype
    in_features: int
    out_features: int
    group_size: int
    bits: int = 4

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.out_features}x{self.in_features}, {self.bits} bits in groups of {self.group_size}, "
            f"{dtype} on {self.device}"
        )

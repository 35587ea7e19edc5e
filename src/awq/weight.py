"""The canonical quantized weight: what search produces, formats pack and kernels prepare.

It stands beside `config` and `errors` at the bottom of the house, so that every room may speak of it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from awq.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """Integer codes with one scale and one zero point per group of input channels.

    The value of a weight is `(codes - zeros) * scales`, with `scales` and `zeros` repeated along the group.

    Args:
        codes: uint8 `[out_features, in_features]`, each below `2**bits`.
        scales: float16, bfloat16 or float32 `[out_features, groups]`.
        zeros: uint8 `[out_features, groups]`, each below `2**bits`.
        bits: width of a code.

    Raises:
        ConfigError: shapes or dtypes do not belong together.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int = 4

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.zeros.dtype != torch.uint8:
            raise ConfigError(f"codes and zeros must be uint8, not {self.codes.dtype} and {self.zeros.dtype}")
        if self.codes.dim() != 2 or self.scales.shape != self.zeros.shape:
            raise ConfigError(
                f"codes {tuple(self.codes.shape)}, scales {tuple(self.scales.shape)} and zeros "
                f"{tuple(self.zeros.shape)} do not belong together"
            )
        out_features, in_features = self.codes.shape
        if self.scales.shape[0] != out_features or in_features % self.scales.shape[1]:
            raise ConfigError(
                f"{self.scales.shape[1]} groups of {self.scales.shape[0]} rows do not cover codes of shape "
                f"{tuple(self.codes.shape)}"
            )

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Columns."""
        return self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.in_features // self.scales.shape[1]

    @property
    def middle(self) -> int:
        """The code in the middle of the range."""
        return 1 << (self.bits - 1)

    @property
    def symmetric(self) -> bool:
        """Whether each zero point is the middle code, so that a layout need not store them."""
        return bool((self.zeros == self.middle).all())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats, `[out_features, in_features]`; computed in float32, then cast."""
        shape = (self.out_features, -1, self.group_size)
        centred = self.codes.view(shape).float() - self.zeros.unsqueeze(-1).float()
        return (centred * self.scales.unsqueeze(-1).float()).view(self.codes.shape).to(dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        return QuantizedWeight(
            self.codes.to(device), self.scales.to(device), self.zeros.to(device), self.bits
        )

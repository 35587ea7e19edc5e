"""The oracle: dequantize, then a dense product. It serves everything; fast paths are tested against it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.kernels.spec import LayerSpec
from awq.weight import QuantizedWeight


class State(NamedTuple):
    """Nibbles uint8 `[out, ceil(in / 2)]`, low nibble first; scales `[out, groups]`; zeros uint8."""

    nibbles: Tensor
    scales: Tensor
    zeros: Tensor
    in_features: int


class TorchDequant:
    """Dequantize and multiply, in plain PyTorch."""

    name = "torch"
    state_type = State

    def refuses(self, spec: LayerSpec) -> str | None:
        """Serves everything up to 4 bits."""
        return None if spec.bits <= 4 else f"{spec.bits} bits do not fit a nibble"

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> State:
        """Pack two codes to a byte."""
        codes = F.pad(weight.codes, (0, weight.in_features % 2))
        nibbles = codes[:, 0::2] | (codes[:, 1::2] << 4)
        return State(nibbles, weight.scales, weight.zeros, weight.in_features)

    def forward(self, inputs: Tensor, state: State) -> Tensor:
        """Dequantize in float32, cast, multiply."""
        weight = QuantizedWeight(self.codes(state), state.scales, state.zeros).dequantize(inputs.dtype)
        return F.linear(inputs, weight)

    def codes(self, state: State) -> Tensor:
        """Undo `prepare`."""
        pairs = torch.stack((state.nibbles & 15, state.nibbles >> 4), dim=-1)
        return pairs.flatten(-2)[:, : state.in_features].contiguous()

"""The oracle: dequantize, then a dense product. It serves everything; fast paths are tested against it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.kernels.spec import LayerSpec
from awq.weight import QuantizedWeight


class State(NamedTuple):
    """Codes packed in uint8: nibbles `[out, ceil(in / 2)]`, low nibble first, or `[out, in]` where codes have
    more than 4 bits; scales `[out, groups]`; zeros uint8."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    in_features: int
    bits: int


class TorchDequant:
    """Dequantize and multiply, in plain PyTorch."""

    name = "torch"
    any_shape = False
    state_type = State

    def refuses(self, spec: LayerSpec) -> str | None:
        """Serves everything."""
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> State:
        """Pack two codes to a byte, where they fit."""
        packed = weight.codes
        if weight.bits <= 4:
            codes = F.pad(weight.codes, (0, weight.in_features % 2))
            packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
        return State(packed, weight.scales, weight.zeros, weight.in_features, weight.bits)

    def forward(self, inputs: Tensor, state: State) -> Tensor:
        """Dequantize in float32, cast, multiply."""
        weight = QuantizedWeight(self.codes(state), state.scales, state.zeros, state.bits)
        return F.linear(inputs, weight.dequantize(inputs.dtype))

    def codes(self, state: State) -> Tensor:
        """Undo `prepare`."""
        if state.bits > 4:
            return state.packed
        pairs = torch.stack((state.packed & 15, state.packed >> 4), dim=-1)
        return pairs.flatten(-2)[:, : state.in_features].contiguous()

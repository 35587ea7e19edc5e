"""Gated feed-forward blocks, found by proof, not by name.

Such a block is a module with three quantized layers whose output, for random inputs, is to the bit that of
one of them on the activation of another's output times the third's.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.kernels.cpu_decoding import WIDE
from awq.kernels.cpu_native import KINDS
from awq.nn import QuantLinear

# Sizes of random inputs; the largest reach whatever a model may clamp.
_SIZES = (1.0, 8.0, 64.0)
_FUNCTIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class Rule(NamedTuple):
    """Which of a module's layers is what."""

    gate: str
    up: str
    down: str
    activation: str


@torch.no_grad()
def rule_of(module: nn.Module, dtype: torch.dtype) -> Rule | None:
    """What a module computes if it is a gated feed-forward block or None."""
    linear = {name: layer for name, layer in module.named_children() if isinstance(layer, QuantLinear)}
    if (
        len(linear) != 3
        or module._parameters
        or any(layer.is_away or layer.is_offloaded for layer in linear.values())
        or "forward" in module.__dict__
        or dtype not in KINDS
    ):
        return None
    for names in itertools.permutations(linear, 3):
        gate, up, down = (linear[name] for name in names)
        if not gate.out_features == up.out_features == down.in_features or gate.out_features % WIDE:
            continue
        if gate.in_features != up.in_features or gate.held_tensors()[0].device.type != "cpu":
            continue
        x = torch.randn(len(_SIZES), gate.in_features, generator=torch.Generator().manual_seed(0))
        x = (torch.tensor(_SIZES).unsqueeze(1) * x).to(dtype)
        try:
            expected = module(x)
        except (RuntimeError, TypeError, ValueError):  # a module that takes something else
            return None
        for activation, function in _FUNCTIONS.items():
            if _same(down(function(gate(x)) * up(x)), expected):
                first, second, last = names
                return Rule(first, second, last, activation)
    return None


def _same(ours: Any, theirs: Any) -> bool:
    return isinstance(theirs, Tensor) and torch.equal(ours, theirs)

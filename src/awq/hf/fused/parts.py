"""Whether modules that C++ stands in for are still what they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from awq.nn import QuantLinear


class Parts:
    """The children of some modules, and what of them C++ has the address of.

    They are looked at before each token, so what is looked at is kept at hand.
    """

    def __init__(self, owners: Sequence[nn.Module]) -> None:
        places = [(owner._modules, name, child) for owner in owners for name, child in owner.named_children()]
        self._places = [(*place, place[2]._forward_hooks, place[2]._forward_pre_hooks) for place in places]
        modules: list[Any] = [child for _, _, child in places]
        layers = [each for each in modules if isinstance(each, QuantLinear)]
        self._layers = [(each, each._state, each.bias) for each in layers]
        self._weights = [
            (parameters, parameters["weight"].data_ptr())
            for parameters in (each._parameters for each in modules)
            if "weight" in parameters
        ]

    def are_as_they_were(self) -> bool:
        """Whether all are in their places with the tensors that they had, and nothing is to see them run."""
        for siblings, name, module, after, before in self._places:
            if siblings.get(name) is not module or after or before:
                return False
        for layer, state, bias in self._layers:
            known = layer.__dict__
            if known["_state"] is not state or known["_buffers"]["bias"] is not bias or "forward" in known:
                return False
        return all(parameters["weight"].data_ptr() == address for parameters, address in self._weights)

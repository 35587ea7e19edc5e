"""Quantized experts in place of parameters that hold all experts of a layer at once.

transformers keeps a layer's experts fused, as `gate_up_proj` `[experts, 2 * intermediate, hidden]` and
`down_proj` `[experts, hidden, intermediate]`; checkpoints, and the engines that read them, keep each expert's
projections apart. Here every expert is a child named by its number that holds one `QuantLinear` per
projection, so names and tensors are the checkpoint's.

Routing, activation and summation stay the original module's: its plain forward runs, and where it takes
expert i's slice of a fused parameter it finds an object whose `F.linear` is the product with that expert's
layers. Nothing here knows an architecture, and an adapter put on a projection is used like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.errors import ConfigError, KernelError, LoadError
from awq.nn.linear import QuantLinear


class QuantExperts(nn.Module):
    """The experts of one layer.

    Args:
        fused: the module to replace; it gives up the parameters named in `parts` and is not a child.
        parts: for each fused parameter, the projections whose rows it holds, in order.
        experts: for each expert, its layers by projection.

    Raises:
        LoadError: the module holds other tensors besides, so it computes something unknown here.
    """

    def __init__(
        self, fused: nn.Module, parts: Mapping[str, Sequence[str]], experts: Sequence[dict[str, nn.Module]]
    ) -> None:
        super().__init__()
        for number, layers in enumerate(experts):
            self.add_module(str(number), nn.ModuleDict(layers))
        self.parts = {name: tuple(projections) for name, projections in parts.items()}
        for name in self.parts:
            delattr(fused, name)
        left = [name for name, _ in (*fused.named_parameters(), *fused.named_buffers())]
        if left:
            raise LoadError(
                f"{type(fused).__name__} holds {', '.join(left)} beside its experts' weights, which "
                "quantized experts have no place for; load this model's float checkpoint instead"
            )
        for name, projections in self.parts.items():
            fused.__dict__[name] = _FusedParameter(self, projections, type(fused).__name__)
        self.__dict__["_fused"] = fused

    def layers(self, number: int, projections: Sequence[str]) -> list[Any]:
        """Layers of one expert: as loaded, or whatever has been put in their place since."""
        expert: Any = self._modules[str(number)]
        return [expert[projection] for projection in projections]

    @torch.compiler.disable(reason="which experts are hit depends on the data")
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original module's plain forward, on quantized experts."""
        fused = self._fused
        fused.training = self.training
        return inspect.unwrap(type(fused).forward)(fused, *args, **kwargs)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module that was replaced, with float parameters; this one is of no use afterwards."""
        fused = self._fused
        if not all(
            isinstance(layer, QuantLinear) for expert in self.children() for layer in expert.children()
        ):
            raise ConfigError(
                "experts with adapters on them cannot be dequantized; unload the adapters first"
            )
        for name, projections in self.parts.items():
            rows = (
                torch.cat([layer.dequantize(dtype) for layer in self.layers(int(number), projections)])
                for number, expert in self.named_children()
                if projections[0] in expert._modules
            )
            setattr(fused, name, nn.Parameter(torch.stack(list(rows)), requires_grad=False))
        return fused

    def __getattr__(self, name: str) -> Any:
        """What the original module tells (`num_experts`, …) is told here too."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_fused" not in self.__dict__:
                raise
            return getattr(self.__dict__["_fused"], name)


class _FusedParameter:
    """Stands for a parameter `[experts, out, in]`: indexing it gives one expert's weight."""

    def __init__(self, owner: QuantExperts, projections: Sequence[str], where: str) -> None:
        self.owner, self.projections, self.where = owner, projections, where

    def __getitem__(self, index: Any) -> _ExpertWeight:
        return _ExpertWeight(self.owner.layers(int(index), self.projections), self.where)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _misused(cls, function, args)


class _ExpertWeight:
    """Stands for one expert's weight `[out, in]`: `F.linear` with it is the product with its layers."""

    def __init__(self, layers: list[Any], where: str) -> None:
        self.layers, self.where = layers, where

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.linear:
            raise _misused(cls, function, args)
        return cls._linear(*args, **(kwargs or {}))

    @staticmethod
    def _linear(inputs: Tensor, weight: _ExpertWeight, bias: Tensor | None = None) -> Tensor:
        outputs = [layer(inputs) for layer in weight.layers]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return out if bias is None else out + bias


def _misused(cls: type, function: Any, args: Any) -> KernelError:
    where = next((arg.where for arg in args if isinstance(arg, cls)), "this model")  # type: ignore[attr-defined]
    name = getattr(function, "__name__", str(function))
    return KernelError(
        f"{where} uses its experts' weights in {name}, where quantized experts can only be multiplied with: "
        "call model.dequantize() before running it"
    )

"""Experts taken apart: one linear layer for each projection of each expert.

transformers keeps a layer's experts fused, as `gate_up_proj` `[experts, 2 * intermediate, hidden]` and
`down_proj` `[experts, hidden, intermediate]` (some models transposed); most checkpoints, and the engines that
read them, keep each expert's projections apart. Here every expert is a child named by its number that holds
one layer per projection, so that names and tensors are the engines', and everything that is true of linear
layers (hooks, folds, quantization) is true of experts.

Routing, activation and summation stay the original module's: its plain forward runs, and where it takes
expert i's slice of a fused parameter it finds an object whose product is the product with that expert's
layers. Nothing here knows an architecture, and an adapter put on a projection is used like any other.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.errors import KernelError

# Fused parameters as transformers names them, and the projections of one expert that each holds.
_PROJECTIONS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__}
Routing = Literal["routed", "all", "first"]


@dataclasses.dataclass(frozen=True)
class Part:
    """How a fused parameter holds its projections.

    Args:
        projections: names, in order.
        transposed: each expert's slice is `[in, out]`.
        interleaved: their output channels take turns, instead of lying one after the other.
    """

    projections: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False

    def measures(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """`(experts, out_features of one projection, in_features)` of a fused parameter of `shape`."""
        experts, rows, columns = shape
        if self.transposed:
            rows, columns = columns, rows
        return experts, rows // len(self.projections), columns

    def rows(self, projection: str, out_features: int) -> slice:
        """The output channels of a projection among all of an expert's."""
        index = self.projections.index(projection)
        if self.interleaved:
            return slice(index, None, len(self.projections))
        return slice(index * out_features, (index + 1) * out_features)

    def join(self, outputs: Sequence[Tensor]) -> Tensor:
        """Outputs of the projections, or their weights transposed, as one tensor in the fused order."""
        if len(outputs) == 1:
            return outputs[0]
        return (
            torch.stack(list(outputs), -1).flatten(-2) if self.interleaved else torch.cat(list(outputs), -1)
        )


def parts_of(module: nn.Module) -> dict[str, Part] | None:
    """The fused parameters of a module that holds experts in the form transformers gives them, or None."""
    fused = {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}
    if not fused or not set(fused) <= set(_PROJECTIONS) or "down_proj" not in fused:
        return None
    outward = fused["down_proj"].shape
    inward = next((p.shape for name, p in fused.items() if name != "down_proj"), None)
    if inward is None:
        return None
    # Experts end in the width they began with; where both readings fit the module itself has to tell.
    upright, transposed = inward[2] == outward[1], inward[1] == outward[2]
    if upright == transposed:
        transposed = bool(getattr(module, "is_transposed", False))
    interleaved = not getattr(module, "is_concatenated", True)
    return {name: Part(_PROJECTIONS[name], transposed, interleaved) for name in fused}


class Experts(nn.Module):
    """The experts of one layer.

    Args:
        fused: the module to replace; it gives up the parameters named in `parts` and is not a child.
        parts: the fused parameters.
        experts: for each expert, its layers by projection.
    """

    def __init__(
        self, fused: nn.Module, parts: Mapping[str, Part], experts: Sequence[Mapping[str, nn.Module]]
    ) -> None:
        super().__init__()
        for number, layers in enumerate(experts):
            self.add_module(str(number), nn.ModuleDict(layers))
        self.parts = dict(parts)
        self.routing: Routing = "routed"
        self.keep: Tensor | None = None
        for name in self.parts:
            delattr(fused, name)
        # What the module holds beside its experts' weights (biases, norms) is used as it is here.
        self._held = [*fused._parameters, *fused._buffers]
        for name, parameter in list(fused._parameters.items()):
            self.register_parameter(name, parameter)
        for name, buffer in list(fused._buffers.items()):
            self.register_buffer(name, buffer, name not in fused._non_persistent_buffers_set)
        for name, child in fused.named_children():
            self.add_module(name, child)
        for name in self._held:
            delattr(fused, name)
        for name, part in self.parts.items():
            fused.__dict__[name] = _FusedParameter(self, part, type(fused).__name__)
        self.__dict__["_fused"] = fused

    @property
    def count(self) -> int:
        """Number of experts."""
        return sum(name.isdigit() for name in self._modules)

    def layers(self, number: int, projections: Sequence[str]) -> list[Any]:
        """Layers of one expert: as loaded, or whatever has been put in their place since."""
        expert: Any = self._modules[str(number)]
        return [expert[projection] for projection in projections]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original module's plain forward, on experts taken apart."""
        fused = self._fused
        fused.training = self.training
        for name in self._held:
            fused.__dict__[name] = getattr(self, name)
        plain = inspect.unwrap(type(fused).forward)
        if self.routing == "routed" and self.keep is None:
            return plain(fused, *args, **kwargs)
        given = tuple(inspect.signature(plain).bind(fused, *args, **kwargs).arguments.values())[1:]
        if len(given) != 3:
            return plain(fused, *given)
        return self._rerouted(plain, *given)

    def _rerouted(self, plain: Callable[..., Any], hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same call with every token sent to all experts, or to the first; or with some tokens left out.

        Experts are called with hidden states `[tokens, hidden]`, indices and weights `[tokens, experts per
        token]`; a module that takes anything else (all tokens for each expert) is left to its ways.
        """
        if self.routing != "routed":
            count = self.count if self.routing == "all" else 1
            everyone = torch.arange(count, device=index.device).expand(index.shape[0], count)
            weights = torch.full_like(everyone, 1 / count, dtype=weights.dtype)
            index = everyone.to(index.dtype)
        if self.keep is None or len(self.keep) != len(index):
            return plain(self._fused, hidden, index, weights)
        out = torch.zeros_like(hidden)
        flat = hidden.view(-1, hidden.shape[-1])
        out.view(flat.shape)[self.keep] = plain(
            self._fused, flat[self.keep], index[self.keep], weights[self.keep]
        )
        return out

    def __getattr__(self, name: str) -> Any:
        """What the original module tells (`num_experts`, …) is told here too."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_fused" not in self.__dict__:
                raise
            return getattr(self.__dict__["_fused"], name)


@contextmanager
def rerouted(block: nn.Module, routing: Routing) -> Iterator[None]:
    """Within a `with` block, send every token to `all` experts, or to the `first` of each layer."""
    experts = [module for module in block.modules() if isinstance(module, Experts)]
    try:
        for module in experts:
            module.routing = routing
        yield
    finally:
        for module in experts:
            module.routing = "routed"


@contextmanager
def only_tokens(block: nn.Module, keep: Tensor | None) -> Iterator[None]:
    """Within a `with` block, experts see the tokens of the bool mask `keep` `[batch, tokens]` only."""
    experts = [module for module in block.modules() if isinstance(module, Experts)]
    try:
        for module in experts:
            module.keep = None if keep is None else keep.reshape(-1)
        yield
    finally:
        for module in experts:
            module.keep = None


@dataclasses.dataclass(frozen=True)
class ExpertName:
    """A layer of an expert: name of the `Experts`, number of the expert, rest of the name, experts in all."""

    owner: str
    number: int
    rest: str
    count: int

    def of(self, number: int) -> str:
        """The name of the same layer in another expert."""
        return f"{self.owner}.{number}.{self.rest}"


def expert_names(block: nn.Module) -> dict[str, ExpertName]:
    """Every layer inside an expert of a block, by name; a list of alike modules counts as experts."""
    out = {}
    for owner, module in block.named_modules():
        count = module.count if isinstance(module, Experts) else _alike(module)
        for number in range(count):
            for rest, _ in module.get_submodule(str(number)).named_modules():
                if rest:
                    place = ExpertName(owner, number, rest, count)
                    out[place.of(number)] = place
    return out


def _alike(module: nn.Module) -> int:
    """Members of a list whose members are built alike and hold linear layers, 0 for anything else."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return 0
    shapes = [
        [
            (name, type(child), *((n, p.shape) for n, p in child._parameters.items() if p is not None))
            for name, child in member.named_modules()
        ]
        for member in module
    ]
    linear = any(name and issubclass(kind, nn.Linear) for name, kind, *_ in shapes[0])
    return len(module) if linear and all(shape == shapes[0] for shape in shapes) else 0


@contextmanager
def rotated(block: nn.Module, steps: int) -> Iterator[None]:
    """Within a `with` block, every expert in a list stands in the place of the one `steps` before it.

    How such experts are called is a model's own affair, so they cannot all be sent all tokens; but each of
    them can be put where tokens go.
    """
    lists = [(module, list(module.children())) for module in block.modules() if _alike(module)]
    try:
        for module, members in lists:
            for place in range(len(members)):
                module._modules[str(place)] = members[(place + steps) % len(members)]
        yield
    finally:
        for module, members in lists:
            module._modules.update({str(place): member for place, member in enumerate(members)})


def rotations(block: nn.Module) -> int:
    """How many rotations bring every expert in a list to every place; 1 where there are none."""
    return max((_alike(module) for module in block.modules()), default=0) or 1


class _FusedParameter:
    """Stands for a parameter `[experts, out, in]`: indexing it gives one expert's weight."""

    def __init__(self, owner: Experts, part: Part, where: str) -> None:
        self.owner, self.part, self.where = owner, part, where

    @property
    def shape(self) -> torch.Size:
        """The fused parameter's; only the number of experts is ever asked for."""
        return torch.Size((self.owner.count,))

    def __getitem__(self, index: Any) -> _ExpertWeight:
        return _ExpertWeight(self.owner.layers(int(index), self.part.projections), self.part, self.where)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.bmm and isinstance(args[1], cls) and args[1].part.transposed:
            inputs, weights = args
            return torch.stack([part @ weights[number] for number, part in enumerate(inputs)])
        raise _misused(cls, function, args)


class _ExpertWeight:
    """Stands for one expert's weight: a product with it is the product with its layers."""

    def __init__(self, layers: list[Any], part: Part, where: str) -> None:
        self.layers, self.part, self.where = layers, part, where

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
        if isinstance(weight, cls):
            if function is F.linear and not weight.part.transposed:
                return cls._linear(*args, **(kwargs or {}))
            if function in _PRODUCTS and weight.part.transposed:
                return cls._linear(args[0], weight)
        raise _misused(cls, function, args)

    @staticmethod
    def _linear(inputs: Tensor, weight: _ExpertWeight, bias: Tensor | None = None) -> Tensor:
        out = weight.part.join([layer(inputs) for layer in weight.layers])
        return out if bias is None else out + bias


def _misused(cls: type, function: Any, args: Any) -> KernelError:
    where = next((arg.where for arg in args if isinstance(arg, cls)), "this model")  # type: ignore[attr-defined]
    name = getattr(function, "__name__", str(function))
    return KernelError(
        f"{where} uses its experts' weights in {name}, where experts taken apart can only be multiplied "
        "with: call model.dequantize() before running it"
    )

"""What stands around a model's blocks: weights read when they are needed, and stand-ins for the blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from awq.errors import StructureError
from awq.model.blocks import decoder_of
from awq.model.skeleton import Skeleton

# Stands for whatever a block may answer beside the hidden states.
MORE = object()


class StandIn(nn.Module):
    """Stands in for a block, and tells of it whatever a model asks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Held outside the module tree: the real block must be reachable, but is no child.
        object.__setattr__(self, "_block", block)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)


def answered(states: Tensor, more: int | None) -> Any:
    """What a block answers: the states, or a tuple with so many things beside them."""
    return states if more is None else (states, *[MORE] * more)


@contextlib.contextmanager
def in_place_of_blocks(model: nn.Module, list_name: str, members: Sequence[nn.Module]) -> Iterator[None]:
    """Within a `with` block, `members` stand where the model has its list of blocks."""
    path, _, attribute = list_name.rpartition(".")
    parent, blocks = model.get_submodule(path), model.get_submodule(list_name)
    setattr(parent, attribute, nn.ModuleList(members))
    try:
        yield
    finally:
        setattr(parent, attribute, blocks)


class AllThere(TorchDispatchMode):
    """Refuses any operation on a tensor without values, some of which would answer with arbitrary memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, output))
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
            raise StructureError("weights of a module are used before it is called, or without")
        return output


def ways_ahead(model: nn.Module, list_name: str) -> Iterator[list[tuple[str, nn.Module]]]:
    """What to load ahead of the dry pass, in the order in which it is tried: nothing, the decoder, all."""
    around = outside(model, list_name)
    inner = decoder_of(model)[1]
    yield []
    yield [(name, module) for name, module in around if not inner or f"{name}.".startswith(f"{inner}.")]
    yield around


@contextlib.contextmanager
def loaded(
    skeleton: Skeleton,
    around: Sequence[tuple[str, nn.Module]],
    device: torch.device,
    ahead: Sequence[tuple[str, nn.Module]],
) -> Iterator[None]:
    """The weights of the modules `around` the blocks, for the time of a `with` block.

    Each module's are read when it is first called, so that text alone leaves a vision tower on disk; those of
    `ahead` at once, for models that use weights, or look where they are, before they call their module.
    """
    present = {name for name, _ in ahead}
    hooks = []
    for name, module in around:
        if name not in present:
            hooks.append(module.register_forward_pre_hook(_reader(skeleton, name, present, device)))
    try:
        skeleton.load_modules(ahead, device)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for _, module in around:
            skeleton.unload_own(module)


def _reader(
    skeleton: Skeleton, name: str, present: set[str], device: torch.device
) -> Callable[[nn.Module, Any], None]:
    """A hook that reads a module's own weights when it is first called."""

    def read(module: nn.Module, _: Any) -> None:
        if name not in present:
            present.add(name)
            skeleton.load_modules([(name, module)], device)

    return read


def outside(model: nn.Module, list_name: str, head: bool = False) -> list[tuple[str, nn.Module]]:
    """All modules but the blocks and, unless it is asked for, the output layer, which no dry pass reaches."""
    output_embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)
    last = None if head else output_embeddings()
    return [
        (name, module)
        for name, module in model.named_modules()
        if not f"{name}.".startswith(f"{list_name}.") and (last is None or module is not last)
    ]

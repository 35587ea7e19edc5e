"""The decoder blocks of a model, and how each of them is called.

The calls are learned from one dry pass: each block is replaced by a recorder that notes its arguments and
hands the hidden states on unchanged. Masks and rotary embeddings differ from layer to layer in many models,
so every block keeps its own. Embeddings run for real; blocks cost nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import StructureError
from awq.model.placement import place
from awq.model.skeleton import Skeleton

# Arguments that would make a block keep state between calls.
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """How the model calls a block for one batch: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states, with all arguments placed where `hidden` is."""
        args, kwargs = place((self.args, self.kwargs), hidden.device)
        return hidden_of(block(hidden, *args, **kwargs))


@dataclasses.dataclass(frozen=True)
class DryPass:
    """One batch as the blocks see it: the hidden states that enter the first, and each one's call."""

    hidden: Tensor
    calls: tuple[BlockCall, ...]


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The name of the list of decoder blocks, and the blocks.

    It is the outermost `ModuleList` with the most parameters inside the text decoder whose members hold
    linear layers.

    Raises:
        StructureError: there is none.
    """
    decoder, prefix = _decoder(model)
    found: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in decoder.named_modules():
        nested = any(name.startswith(f"{outer}.") for _, outer, _ in found)
        if not isinstance(module, nn.ModuleList) or nested or not len(module):
            continue
        if any(isinstance(child, nn.Linear) for child in module.modules()):
            found.append((sum(p.numel() for p in module.parameters()), name, module))
    if not found:
        raise StructureError(f"{type(model).__name__} has no list of decoder blocks with linear layers")
    _, name, blocks = max(found, key=lambda item: item[0])
    return f"{prefix}.{name}".lstrip("."), list(blocks)


def kind_of(block: nn.Module) -> tuple[Any, ...]:
    """What makes two blocks alike: module names, types and switches, and the shapes of their parameters."""
    modules = tuple(
        (name, type(module).__qualname__, *_switches(module)) for name, module in block.named_modules()
    )
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return modules + shapes


def _switches(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes by which modules of one class behave differently: flags, words, and what is or is not there.

    Numbers are left out, for many models give each block its own. So are words with a number in them.
    """
    found: list[tuple[str, Any]] = []
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if value is None or isinstance(value, (bool, int, float)):
            found.append((name, value if isinstance(value, bool) or value is None else "a number"))
        elif isinstance(value, str) and not any(letter.isdigit() for letter in value):
            found.append((name, value))
    return found


def _decoder(model: nn.Module) -> tuple[nn.Module, str]:
    """The text decoder inside a model, and its name there."""
    get_decoder: Any = getattr(model, "get_decoder", lambda: model)
    decoder = get_decoder()
    return decoder, next(name for name, module in model.named_modules() if module is decoder)


class _Stop(Exception):  # noqa: N818 (not an error: it ends the dry pass behind the last block)
    pass


class _Recorder(nn.Module):
    """Stands in for a block, notes how it is called, and answers with the hidden states it was given."""

    def __init__(
        self, block: nn.Module, log: list[tuple[Tensor, BlockCall]], last: bool, tuples: bool
    ) -> None:
        super().__init__()
        # Held outside the module tree: the real block must be reachable, but is no child.
        object.__setattr__(self, "_block", block)
        self._log, self._last, self._tuples = log, last, tuples

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call."""
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        kwargs = {key: None if key in _CACHES else value for key, value in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        self._log.append((hidden, BlockCall(args, kwargs)))
        if self._last:
            raise _Stop
        return (hidden,) if self._tuples else hidden


@torch.no_grad()
def dry_pass(
    skeleton: Skeleton, list_name: str, inputs: Sequence[tuple[Tensor, Tensor | None]], device: torch.device
) -> list[DryPass]:
    """Run every batch through the model with recorders in place of the blocks.

    Args:
        skeleton: the opened model; the weights around its blocks are loaded here, and freed again.
        list_name: the name of the list of blocks.
        inputs: `(input_ids [batch, tokens], mask [batch, tokens] bool or None)` for each batch.
        device: where the embeddings run; what is recorded comes back on the CPU.

    Raises:
        StructureError: the model does not pass hidden states from block to block in a way understood here.
    """
    model = skeleton.model
    blocks = model.get_submodule(list_name)
    path, _, attribute = list_name.rpartition(".")
    parent = model.get_submodule(path)
    surroundings = _surroundings(model, list_name)
    skeleton.load_modules(surroundings, device)
    reasons = []
    try:
        for tuples in (False, True):
            try:
                return [_record(model, parent, attribute, blocks, batch, tuples, device) for batch in inputs]
            except Exception as error:  # the model's own code, anything may come
                reasons.append(f"{type(error).__name__}: {error}")
    finally:
        setattr(parent, attribute, blocks)
        for _, module in surroundings:
            skeleton.unload_own(module)
    raise StructureError(
        f"{type(model).__name__} does not hand hidden states from block to block as tensors "
        f"({reasons[0]}) nor as tuples ({reasons[1]})"
    )


def _record(
    model: nn.Module,
    parent: nn.Module,
    attribute: str,
    blocks: nn.Module,
    batch: tuple[Tensor, Tensor | None],
    tuples: bool,
    device: torch.device,
) -> DryPass:
    """One batch through the recorders."""
    ids, mask = batch
    log: list[tuple[Tensor, BlockCall]] = []
    members = list(blocks.children())
    recorders = [_Recorder(block, log, block is members[-1], tuples) for block in members]
    setattr(parent, attribute, nn.ModuleList(recorders))
    attention_mask = None if mask is None else mask.to(device=device, dtype=torch.long)
    with contextlib.suppress(_Stop):
        model(input_ids=ids.to(device), attention_mask=attention_mask, use_cache=False)
    shapes = [tuple(hidden.shape) for hidden, _ in log]
    if len(shapes) != len(members) or len(set(shapes)) != 1 or len(shapes[0]) != 3:
        raise StructureError(
            f"{len(members)} blocks were called {len(shapes)} times, on shapes {set(shapes)}"
        )
    hidden, calls = place((log[0][0], [(call.args, call.kwargs) for _, call in log]), torch.device("cpu"))
    return DryPass(hidden, tuple(BlockCall(args, kwargs) for args, kwargs in calls))


def _surroundings(model: nn.Module, list_name: str) -> list[tuple[str, nn.Module]]:
    """The text decoder's modules outside its blocks, with their names: embeddings, rotary tables, norms."""
    _, prefix = _decoder(model)
    output_embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = output_embeddings()
    return [
        (name, module)
        for name, module in model.named_modules()
        if f"{name}.".startswith(f"{prefix}." if prefix else "")
        and not f"{name}.".startswith(f"{list_name}.")
        and module is not head
    ]

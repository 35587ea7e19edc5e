"""The decoder blocks of a model, and how one of them is called for one batch.

Masks and rotary embeddings differ from layer to layer in many models, so every block keeps its own call.
What models do outside their blocks belongs to the call as well: visual features that are added to the hidden
states in front of a block, and dictionaries through which blocks hand keys and values to later ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import StructureError
from awq.model.placement import place


@dataclasses.dataclass(frozen=True)
class Added:
    """What a model adds to the hidden states in front of a block, whatever they are.

    Args:
        rows: int64 `[n]`, places in the hidden states seen as `[places, width]`.
        values: float32 `[n, width]`.
    """

    rows: Tensor
    values: Tensor

    @classmethod
    def of(cls, difference: Tensor) -> Added | None:
        """The places where a difference `[..., width]` is not zero; None if there are none."""
        flat = difference.reshape(-1, difference.shape[-1])
        rows = flat.abs().amax(-1).nonzero().squeeze(-1)
        return cls(rows, flat[rows]) if len(rows) else None

    def to(self, hidden: Tensor) -> Tensor:
        """`hidden` with the values added, as a new tensor."""
        out = hidden.clone()
        values = self.values.to(hidden)
        out.view(-1, hidden.shape[-1]).index_add_(0, self.rows.to(hidden.device), values)
        return out


@dataclasses.dataclass(frozen=True)
class BlockCall:
    """How the model calls a block for one batch: everything but the hidden states.

    Dictionaries and lists that several blocks of a model are given are one object in all of their calls.
    `keyword` is the name under which hidden states are given; None if they are the first argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: Added | None = None
    keyword: str | None = None

    def run(
        self,
        block: Callable[..., Any],
        hidden: Tensor,
        keep: bool = False,
        written: list[Tensor] | None = None,
    ) -> Tensor:
        """The block's output hidden states, with all arguments placed where `hidden` is.

        Args:
            block: its weights in place.
            hidden: float32 `[batch, tokens, width]`.
            keep: later blocks shall find what this one writes into dictionaries and lists it is given.
                Otherwise that is forgotten, so that a block may run again and again.
            written: filled with the tensors among it.
        """
        moved: dict[int, Any] = {}
        args, kwargs = place((self.args, self.kwargs), hidden.device, moved)
        holders = list(self.holders())
        before = [entries_of(moved[id(holder)]) for holder in holders]
        hidden = hidden if self.added is None else self.added.to(hidden)
        if self.keyword is None:
            output = hidden_of(block(hidden, *args, **kwargs))
        else:
            output = hidden_of(block(*args, **{self.keyword: hidden}, **kwargs))
        for holder, old in zip(holders, before, strict=True):
            for key, value in entries_of(moved[id(holder)]).items():
                if key in old and old[key] is value:
                    continue
                if keep:
                    write_entry(holder, key, place(value, torch.device("cpu")))
                if written is not None:
                    parts = [value] if isinstance(value, Tensor) else value
                    written += [part for part in parts if isinstance(part, Tensor)]
        return output

    def holders(self) -> Iterator[Any]:
        """The dictionaries and lists among the arguments, which blocks may write into."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, (MutableMapping, MutableSequence)):
                yield value


def entries_of(holder: Any) -> dict[Any, Any]:
    """What a dictionary or a list holds, by key or place."""
    return dict(holder) if isinstance(holder, MutableMapping) else dict(enumerate(holder))


def write_entry(holder: Any, key: Any, value: Any) -> None:
    """Put an entry in a dictionary or a list, which grows by one if it has to."""
    if isinstance(holder, MutableSequence) and key >= len(holder):
        holder.append(value)
    else:
        holder[key] = value


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


def find_blocks(model: nn.Module, named: str | None = None) -> tuple[str, list[nn.Module]]:
    """The name of the list of decoder blocks, and the blocks.

    It is the outermost `ModuleList` with the most parameters inside the text decoder whose members hold
    linear layers.

    Args:
        model: the whole model.
        named: the name of the list, where the user has given it.

    Raises:
        StructureError: there is none.
    """
    if named is not None:
        listed = dict(model.named_modules()).get(named)
        if not isinstance(listed, nn.ModuleList) or not len(listed):
            raise StructureError(f"{type(model).__name__} has no list of blocks that is called {named}")
        return named, list(listed)
    decoder, prefix = decoder_of(model)
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


def decoder_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The text decoder inside a model, and its name there."""
    get_decoder: Any = getattr(model, "get_decoder", lambda: model)
    decoder = get_decoder()
    return decoder, next(name for name, module in model.named_modules() if module is decoder)

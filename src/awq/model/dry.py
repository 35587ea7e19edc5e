"""The dry pass: how each block is called, learned without running any.

Each block is replaced by a recorder that notes its arguments and answers with zeros. Embeddings (and, for
inputs with images, the vision tower) run for real; blocks cost nothing. What the next recorder receives in
place of the zeros is what the model adds between the two blocks.

A second pass answers with noise instead: whatever then differs depends on the hidden states, and cannot be
replayed when blocks run one by one. Such a model is refused by name, never quantized wrongly.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import StructureError, first_line
from awq.model.around import (
    MORE,
    AllThere,
    StandIn,
    answered,
    in_place_of_blocks,
    loaded,
    outside,
    ways_ahead,
)
from awq.model.blocks import Added, BlockCall
from awq.model.placement import place
from awq.model.skeleton import Skeleton

# Arguments that would make a block keep state between calls.
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
# Differences up to this, relative to the largest value, are rounding noise of float32.
_NOISE = 1e-5
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class DryPass:
    """One batch as the blocks see it: the hidden states that enter the first, and each one's call.

    `more` is the number of things that blocks answer beside the states; None when they answer with no tuple.
    """

    hidden: Tensor
    calls: tuple[BlockCall, ...]
    more: int | None = None

    @property
    def shares_state(self) -> bool:
        """Whether blocks are given the same dictionary or list, through which they may talk."""
        seen = [id(holder) for call in self.calls for holder in call.holders()]
        return len(set(seen)) < len(seen)


class _Stop(Exception):  # noqa: N818 (not an error: it ends the dry pass behind the last block)
    pass


@dataclasses.dataclass
class _Log:
    """What recorders note, and what they answer with."""

    answer: Callable[[int, Tensor], Tensor]
    more: int | None
    last: int
    keyword: str | None = None
    received: list[Tensor] = dataclasses.field(default_factory=list)
    answers: list[Tensor] = dataclasses.field(default_factory=list)
    calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = dataclasses.field(default_factory=list)


class _Recorder(StandIn):
    """Stands in for a block, notes how it is called, and answers as the log says."""

    def __init__(self, block: nn.Module, index: int, log: _Log) -> None:
        super().__init__(block)
        self._index, self._log = index, log

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call."""
        log = self._log
        if any(value is MORE for value in (*args, *kwargs.values())):
            raise StructureError(
                f"block {self._index} is given what an earlier one answers beside its states"
            )
        if args:
            hidden, args = args[0], args[1:]
        else:
            log.keyword = log.keyword or _keyword_of_states(kwargs)
            hidden = kwargs.pop(log.keyword)
        kwargs = {key: None if key in _CACHES else value for key, value in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        log.received.append(hidden)
        log.calls.append((self._index, args, kwargs))
        if self._index == log.last:
            raise _Stop
        answer = log.answer(self._index, hidden)
        log.answers.append(answer)
        return answered(answer, log.more)


# What blocks are tried with: hidden states alone, and tuples with so many things more.
_ANSWERS = (None, 0, 1, 2)


def _keyword_of_states(kwargs: Mapping[str, Any]) -> str:
    """The name under which a block is given hidden states: the usual one, or that of the first like them."""
    like = [
        name
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
    ]
    if "hidden_states" not in kwargs and not like:
        raise StructureError(f"a block is given no hidden states, but {', '.join(kwargs) or 'nothing'}")
    return "hidden_states" if "hidden_states" in kwargs else like[0]


@torch.no_grad()
def dry_pass(
    skeleton: Skeleton, list_name: str, inputs: Sequence[Mapping[str, Any]], device: torch.device
) -> list[DryPass]:
    """Run every batch through the model with recorders in place of the blocks.

    Args:
        skeleton: the opened model; the weights around its blocks are loaded here as far as the batches need
            them, and freed again.
        list_name: the name of the list of blocks.
        inputs: for each batch what the model is called with: `input_ids` int64 `[batch, tokens]`,
            `attention_mask`, and what a processor makes of images.
        device: where the embeddings run; what is recorded comes back on the CPU.

    Raises:
        StructureError: the model refuses an input, does not pass hidden states from block to block in a way
            understood here, or changes them in between in a way that depends on them.
    """
    batches = [place(_float32(batch), _CPU) for batch in inputs]
    reasons = []
    around = outside(skeleton.model, list_name)
    for ahead in ways_ahead(skeleton.model, list_name):
        with loaded(skeleton, around, device, ahead):
            for more in _ANSWERS:
                recording = _Recording(skeleton.model, list_name, device, more)
                try:
                    passes = [recording.run(batch) for batch in batches]
                except StructureError as error:
                    reasons.append(str(error))
                    continue
                except Exception as error:  # the model's own code, anything may come
                    reasons.append(f"{type(error).__name__}: {first_line(error)}")
                    continue
                for index in _one_of_each(batches):
                    recording.check(batches[index], passes[index])
                return passes
    # With all weights at hand the reasons are the model's own.
    name, (tensors, *tuples) = type(skeleton.model).__name__, reasons[-len(_ANSWERS) :]
    if set(tuples) == {tensors}:
        raise StructureError(f"{name} cannot be run on the calibration data: {tensors}")
    raise StructureError(
        f"{name} does not hand hidden states from block to block as tensors ({tensors}) nor as tuples "
        f"({'; '.join(dict.fromkeys(tuples))})"
    )


def _float32(batch: Mapping[str, Any]) -> dict[str, Any]:
    floats = {
        key: value for key, value in batch.items() if torch.is_tensor(value) and value.is_floating_point()
    }
    return {**batch, **{key: value.float() for key, value in floats.items()}}


def _one_of_each(batches: Sequence[Mapping[str, Any]]) -> list[int]:
    """The first batch of each kind: kinds differ by what the model is given beside the tokens."""
    first: dict[tuple[str, ...], int] = {}
    for index, batch in enumerate(batches):
        given = sorted(key for key, value in batch.items() if value is not None)
        first.setdefault(tuple(given), index)
    return list(first.values())


@dataclasses.dataclass(frozen=True)
class _Recording:
    """Recorders in a model.

    Args:
        model: with the weights around its blocks.
        list_name: the name of the list of blocks.
        device: where the model runs.
        more: blocks answer with a tuple that holds so many things beside the states; None for no tuple.
    """

    model: nn.Module
    list_name: str
    device: torch.device
    more: int | None

    def run(self, batch: Mapping[str, Any]) -> DryPass:
        """Note one batch."""
        log = self._log(batch, lambda _, hidden: torch.zeros_like(hidden))
        hidden, calls = place((log.received[0], [call[1:] for call in log.calls]), _CPU)
        added = [None, *(Added.of(self._difference(log, index)) for index in range(1, len(log.calls)))]
        made = tuple(
            BlockCall(args, kwargs, more and Added(more.rows.cpu(), more.values.cpu()), log.keyword)
            for (args, kwargs), more in zip(calls, added, strict=True)
        )
        self._refuse_objects(made)
        return DryPass(hidden, made, self.more)

    def check(self, batch: Mapping[str, Any], found: DryPass) -> None:
        """Prove that what was noted does not depend on what the blocks answer.

        Raises:
            StructureError: it does.
        """
        log = self._log(batch, _noise)
        calls = place([call[1:] for call in log.calls], _CPU)
        for index, (args, kwargs) in enumerate(calls):
            call, name = found.calls[index], f"block {index} of {type(self.model).__name__}"
            changed = _differing(
                {**dict(enumerate(call.args)), **call.kwargs}, {**dict(enumerate(args)), **kwargs}
            )
            if changed is not None:
                raise StructureError(
                    f"{name} is given an argument ({changed}) that depends on what earlier blocks answered; "
                    "such a model cannot be quantized block by block"
                )
            if index == 0:
                continue
            difference = self._difference(log, index)
            noted = torch.zeros_like(difference)
            if call.added is not None:
                noted = call.added.to(noted)
            largest = max(float(log.answers[index - 1].abs().max()), float(noted.abs().max()))
            if not float((difference - noted).abs().max()) <= _NOISE * largest:
                raise StructureError(
                    f"{type(self.model).__name__} changes the hidden states between block {index - 1} and "
                    f"{name} in a way that depends on them; such a model cannot be quantized block by block"
                )

    def _log(self, batch: Mapping[str, Any], answer: Callable[[int, Tensor], Tensor]) -> _Log:
        members = list(self.model.get_submodule(self.list_name).children())
        log = _Log(answer, self.more, len(members) - 1)
        recorders = [_Recorder(block, index, log) for index, block in enumerate(members)]
        standing_in = in_place_of_blocks(self.model, self.list_name, recorders)
        with standing_in, contextlib.suppress(_Stop), AllThere():
            self.model(**place(batch, self.device), use_cache=False)
        shapes = {tuple(hidden.shape) for hidden in log.received}
        order = [call[0] for call in log.calls]
        skipped = sorted(set(range(len(members))) - set(order))
        if order and skipped and order == sorted(set(order)):
            raise StructureError(
                f"block {skipped[0]} does not run on every input; a model that passes over blocks cannot be "
                "quantized block by block"
            )
        if order != list(range(len(members))):
            raise StructureError(f"{len(members)} blocks were called in the order {order}")
        (shape, *others) = shapes
        if others or len(shape) < 3 or log.received[0].is_meta:
            raise StructureError(f"blocks were called on hidden states of shapes {shapes}")
        mask = batch.get("attention_mask")
        if mask is not None and tuple(mask.shape) != shape[-3:-1]:
            raise StructureError(f"a mask of shape {tuple(mask.shape)} stands for hidden states of {shape}")
        return log

    @staticmethod
    def _difference(log: _Log, index: int) -> Tensor:
        """What stands in front of a block beyond the answer of the one before."""
        return log.received[index] - log.answers[index - 1]

    def _refuse_objects(self, calls: Sequence[BlockCall]) -> None:
        """Objects of unknown classes may carry state from block to block, unseen.

        Raises:
            StructureError: several blocks are given the same one.
        """
        seen: dict[int, int] = {}
        for index, call in enumerate(calls):
            for value in (*call.args, *call.kwargs.values()):
                if not _is_plain(value) and seen.setdefault(id(value), index) != index:
                    name, kind = type(self.model).__name__, type(value).__name__
                    raise StructureError(
                        f"blocks {seen[id(value)]} and {index} of {name} share an object ({kind}) that may "
                        "carry state from one to the other; such a model cannot be quantized block by block"
                    )


def _noise(index: int, hidden: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(hidden.shape, generator=generator).to(hidden)


def _is_plain(value: Any) -> bool:
    """Whether a value cannot carry state, or is one whose state is followed (see `BlockCall.run`)."""
    if value is None or isinstance(value, (bool, int, float, str, Enum, Tensor, torch.dtype, torch.device)):
        return True
    if isinstance(value, (Mapping, list, tuple, set, frozenset)) or callable(value):
        return True
    return hasattr(value, "to_dict")  # a configuration


def _differing(one: Any, other: Any, name: str = "") -> str | None:
    """Where two nested values hold tensors that differ; None if they do not."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return name
        if one is other or torch.equal(one, other):
            return None
        if not one.is_floating_point():
            return name
        close = torch.allclose(one, other, rtol=_NOISE, atol=_NOISE, equal_nan=True)
        return None if close else name
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if set(one) != set(other):
            return name
        pairs = [(f"{name}.{key}".strip("."), one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return name
        pairs = [(f"{name}.{i}".strip("."), *both) for i, both in enumerate(zip(one, other, strict=True))]
    else:
        return name if isinstance(one, Tensor) != isinstance(other, Tensor) else None
    return next((found for key, a, b in pairs if (found := _differing(a, b, key)) is not None), None)

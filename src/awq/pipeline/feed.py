"""The calibration samples on their way through the blocks: batches, their calls, their hidden states.

Two small probes travel along, as further batches: a longer input that proves folds, and a batch of single
tokens that discovers them. They count in no statistic.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from awq.calibration import Batch as TokenBatch
from awq.calibration import ModelInputs, Sample, make_batches, rows_of
from awq.errors import StructureError
from awq.model import Skeleton, dry_pass
from awq.model.blocks import entries_of, write_entry
from awq.pipeline.memory import has_room
from awq.pipeline.observe import Batch

_PROBE_ROWS, _PROBE_TOKENS, _SINGLE_TOKENS = 2, 24, 16
# An input with images is the long probe if it has no more tokens than this.
_MOST_PROBE_TOKENS = 4096
# Samples that are followed at least, if there are as many.
_FEWEST_FOLLOWED = 8
# Of the hidden states, at most: before and behind a block, of its float and of its quantized self, and a sum.
_COPIES = 5


class Feed:
    """Batches of calibration samples at the door of the next block.

    Args:
        skeleton: the opened model.
        list_name: its list of blocks.
        samples: int64 `[tokens]` each, or inputs with images.
        batch_tokens: most tokens of a batch, padding counted; inputs with images are batches as they are.
        device: where the embeddings run.
        follow: one of so many samples goes through the quantized blocks too; 0 for none.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        list_name: str,
        samples: Sequence[Sample],
        batch_tokens: int,
        device: torch.device,
        follow: int = 0,
    ) -> None:
        self._skeleton, self._list_name, self._device = skeleton, list_name, device
        self._texts = [sample for sample in samples if isinstance(sample, Tensor)]
        self._given = [_batch_of(sample) for sample in samples if isinstance(sample, ModelInputs)]
        self._followed = tuple(_taken(len(held), follow) for held in (self._texts, self._given))
        self._probes = probes(samples, skeleton.placeholders)
        self.batch_tokens = batch_tokens
        self._prepare()
        # A GPU with room to spare keeps the hidden states: copying them to and fro takes half of its time.
        sizes = (item.hidden.nbytes for item in self._passes)
        self._home = device if has_room(device, _COPIES * sum(sizes)) else torch.device("cpu")
        self.hidden = [item.hidden.to(self._home) for item in self._passes]
        # Hidden states as the quantized blocks before give them; None where nobody asks.
        self.quantized: list[Tensor] | None = None

    def _prepare(self) -> None:
        # Those that are followed are batches of their own, and the first ones.
        texts, given = self._followed
        others = set(range(len(self._texts))) - set(texts)
        first = self._batches_of(texts) + [self._given[index] for index in given]
        rest = [batch for index, batch in enumerate(self._given) if index not in set(given)]
        self.followed = len(first)
        self._token_batches: list[TokenBatch] = [*first, *self._batches_of(sorted(others)), *rest]
        inputs = [batch.inputs for batch in self._token_batches]
        self._passes = dry_pass(self._skeleton, self._list_name, [*inputs, *self._probes], self._device)
        self._given_to_blocks = {number: entries_of(holder) for number, holder in self._holders()}

    def _batches_of(self, chosen: Sequence[int]) -> list[TokenBatch]:
        """Batches of some of the texts; they know them by their place among all."""
        made = make_batches([self._texts[index] for index in chosen], batch_tokens=self.batch_tokens)
        return [
            dataclasses.replace(batch, index=tuple(chosen[place] for place in batch.index)) for batch in made
        ]

    @property
    def followed_bytes(self) -> int:
        """Bytes of the hidden states of the samples that are followed."""
        return sum(item.hidden.nbytes for item in self._passes[: self.followed])

    @property
    def has_images(self) -> bool:
        """Whether the dry pass needs more than the text decoder."""
        return bool(self._given)

    @property
    def shares_state(self) -> bool:
        """Whether blocks may hand things to later ones, beside the hidden states."""
        return any(item.shares_state for item in self._passes)

    def at(self, block: int, quantized: bool = False) -> list[Batch]:
        """The calibration batches in front of a block.

        Args:
            block: its number.
            quantized: those of the samples that are followed, as the quantized blocks before give them.
        """
        masks = [batch.mask for batch in self._token_batches[: self.followed if quantized else None]]
        states = self.hidden if not quantized or self.quantized is None else self.quantized
        return [
            Batch(hidden, item.calls[block], mask)
            for hidden, item, mask in zip(states, self._passes, masks, strict=False)
        ]

    def put(self, states: list[Tensor]) -> None:
        """Take hidden states back from a journal: all batches', and the quantized blocks' where there are
        some."""
        count = len(self._passes)
        states = [state.to(self._home) for state in states]
        self.hidden, rest = states[:count], states[count:]
        self.quantized = rest or None

    def states(self) -> list[Tensor]:
        """What `put` takes."""
        return self.hidden + (self.quantized or [])

    def probes_at(self, block: int) -> tuple[Batch, Batch]:
        """The long and the single-token probe in front of a block."""
        long, single = (
            Batch(hidden, item.calls[block], None)
            for hidden, item in zip(self.hidden[-2:], self._passes[-2:], strict=True)
        )
        return long, single

    def smaller(self) -> None:
        """Halve the batches after memory ran out; the hidden states are cut and joined accordingly.

        Raises:
            StructureError: nothing can be halved any more.
        """
        longest = max((len(sample) for sample in self._texts), default=0)
        if self.shares_state:
            raise StructureError(
                f"batches of {self.batch_tokens} tokens do not fit in memory, and this model's blocks share "
                "state, which cannot be cut: start again with a smaller --batch-tokens"
            )
        if self.batch_tokens <= longest or not self._texts:
            what = "one input with images" if self._given else f"one sample of {longest} tokens"
            raise StructureError(f"{what} does not fit in memory; use a smaller --seq-len or smaller images")
        self._home = torch.device("cpu")
        self.put([state.cpu() for state in self.states()])
        before = self._token_batches
        self.batch_tokens = max(longest, self.batch_tokens // 2)
        self._prepare()
        count, followed = len(before), self._token_batches[: self.followed]
        self.hidden = self._cut(before, self.hidden, self._token_batches) + self.hidden[count:]
        if self.quantized is not None:
            self.quantized = self._cut(before, self.quantized, followed)

    def _cut(
        self, before: Sequence[TokenBatch], states: Sequence[Tensor], now: Sequence[TokenBatch]
    ) -> list[Tensor]:
        """Hidden states of the batches `before`, as many as there are, as the batches `now` have them.

        Inputs with images are batches by themselves, and stay as they are.
        """
        held = list(zip(before, states, strict=False))
        whole = (hidden for batch, hidden in held if not batch.index)
        rows = {
            index: hidden[row, : len(self._texts[index])]
            for batch, hidden in held
            for row, index in enumerate(batch.index)
        }
        return [
            torch.nn.utils.rnn.pad_sequence([rows[index] for index in batch.index], batch_first=True)
            if batch.index
            else next(whole)
            for batch in now
        ]

    def state(self) -> dict[str, Tensor]:
        """What blocks have handed to later ones, by names that `restore` understands.

        Raises:
            StructureError: it is not made of tensors.
        """
        out: dict[str, Tensor] = {}
        for number, holder in self._holders():
            given = self._given_to_blocks[number]
            for key, value in entries_of(holder).items():
                if key in given and given[key] is value:
                    continue  # the model's own, which the next dry pass gives again
                parts = [value] if isinstance(value, Tensor) else value
                if not isinstance(parts, (tuple, list)) or not all(isinstance(p, Tensor) for p in parts):
                    raise StructureError(f"blocks share {key!r}, which is no tensor and cannot be kept")
                for place, part in enumerate(parts):
                    alone = isinstance(value, Tensor)
                    out[json.dumps([number, key, None if alone else place])] = part
        return out

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned in an earlier run."""
        holders = dict(self._holders())
        found: dict[tuple[int, Any], dict[int | None, Tensor]] = {}
        for name, tensor in state.items():
            number, key, place = json.loads(name)
            found.setdefault((number, key), {})[place] = tensor
        for (number, key), parts in sorted(found.items(), key=str):
            value = parts[None] if None in parts else tuple(parts[place] for place in range(len(parts)))
            write_entry(holders[number], key, value)

    def _holders(self) -> Iterator[tuple[int, Any]]:
        """What several blocks of a batch are given, numbered in a fixed order."""
        seen: set[int] = set()
        number = 0
        for item in self._passes:
            if not item.shares_state:
                continue
            for call in item.calls:
                for holder in call.holders():
                    if id(holder) not in seen:
                        seen.add(id(holder))
                        yield number, holder
                        number += 1


def _taken(count: int, every: int) -> list[int]:
    """Places of one of `every` samples, or of more where there are few; none for 0."""
    return list(range(0, count, max(1, min(every, count // _FEWEST_FOLLOWED)))) if every else []


def _batch_of(given: ModelInputs) -> TokenBatch:
    more = {
        name: value for name, value in given.values.items() if name not in ("input_ids", "attention_mask")
    }
    return TokenBatch(given.input_ids, given.mask, (), more)


def probes(samples: Sequence[Sample], placeholders: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two probes: what the model is called with for each.

    The long one is the smallest input with images, so that folds are proved for them too, or `[2, up to 24]`
    tokens of the longest sample; the other one `[16, 1]` tokens of text from everywhere.
    """
    rows = [row for sample in samples for row in _text_rows(sample, placeholders)]
    longest = max(rows, key=len)
    everything = torch.cat(rows)
    places = torch.linspace(0, len(everything) - 1, _SINGLE_TOKENS).long()
    single = {"input_ids": everything[places].unsqueeze(1)}
    images = [_batch_of(sample) for sample in samples if isinstance(sample, ModelInputs)]
    images = [
        batch for batch in images if batch.mask is None and batch.input_ids.numel() <= _MOST_PROBE_TOKENS
    ]
    if images:
        return min(images, key=lambda batch: batch.input_ids.numel()).inputs, single
    length = max(1, min(_PROBE_TOKENS, len(longest) // _PROBE_ROWS))
    whole = longest[: _PROBE_ROWS * length] if len(longest) >= _PROBE_ROWS else longest.repeat(_PROBE_ROWS)
    return {"input_ids": whole.view(_PROBE_ROWS, length)}, single


def _text_rows(sample: Sample, placeholders: Tensor) -> list[Tensor]:
    """A sample's token ids, without those that stand for images in an input that has some."""
    if isinstance(sample, Tensor):
        return [sample]
    rows = [ids[~torch.isin(ids, placeholders)] for ids in rows_of(sample)]
    return [row for row in rows if len(row)] or rows_of(sample)

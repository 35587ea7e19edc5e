"""The calibration samples on their way through the blocks: batches, their calls, their hidden states.

Two small probes travel along, as further batches: a few longer inputs that prove folds, and a batch of single
tokens that discovers them. They count in no statistic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from awq.calibration import Batch as TokenBatch
from awq.calibration import make_batches
from awq.errors import StructureError
from awq.model import Skeleton, dry_pass
from awq.pipeline.observe import Batch

_PROBE_ROWS, _PROBE_TOKENS, _SINGLE_TOKENS = 2, 24, 16


class Feed:
    """Batches of calibration samples at the door of the next block.

    Args:
        skeleton: the opened model.
        list_name: its list of blocks.
        samples: int64 `[tokens]` each.
        batch_tokens: most tokens of a batch, padding counted.
        device: where the embeddings run.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        list_name: str,
        samples: Sequence[Tensor],
        batch_tokens: int,
        device: torch.device,
    ) -> None:
        self._skeleton, self._list_name, self._device = skeleton, list_name, device
        self._samples = samples
        self.batch_tokens = batch_tokens
        self._prepare()
        self.hidden = [item.hidden for item in self._passes]

    def _prepare(self) -> None:
        self._token_batches: list[TokenBatch] = make_batches(self._samples, batch_tokens=self.batch_tokens)
        inputs = [(batch.input_ids, batch.mask) for batch in self._token_batches]
        inputs += [(ids, None) for ids in probes(self._samples)]
        self._passes = dry_pass(self._skeleton, self._list_name, inputs, self._device)

    def at(self, block: int) -> list[Batch]:
        """The calibration batches in front of a block."""
        masks = [batch.mask for batch in self._token_batches]
        return [
            Batch(hidden, item.calls[block], mask)
            for hidden, item, mask in zip(self.hidden, self._passes, masks, strict=False)
        ]

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
            StructureError: a single sample is too much already.
        """
        longest = max(len(sample) for sample in self._samples)
        if self.batch_tokens <= longest:
            raise StructureError(
                f"one sample of {longest} tokens does not fit in memory; use a smaller --seq-len"
            )
        rows = {
            index: hidden[row, : len(self._samples[index])]
            for batch, hidden in zip(self._token_batches, self.hidden, strict=False)
            for row, index in enumerate(batch.index)
        }
        probe_states = self.hidden[-2:]
        self.batch_tokens = max(longest, self.batch_tokens // 2)
        self._prepare()
        joined = [
            torch.nn.utils.rnn.pad_sequence([rows[index] for index in batch.index], batch_first=True)
            for batch in self._token_batches
        ]
        self.hidden = joined + probe_states


def probes(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids of the two probes, from the longest sample: `[2, up to 24]` and `[16, 1]`."""
    longest = max(samples, key=len)
    length = max(1, min(_PROBE_TOKENS, len(longest) // _PROBE_ROWS))
    rows = longest[: _PROBE_ROWS * length] if len(longest) >= _PROBE_ROWS else longest.repeat(_PROBE_ROWS)
    everything = torch.cat(list(samples))
    places = torch.linspace(0, len(everything) - 1, _SINGLE_TOKENS).long()
    return rows.view(_PROBE_ROWS, length), everything[places].unsqueeze(1)

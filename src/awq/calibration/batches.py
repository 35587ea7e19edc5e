"""Samples of any length side by side: sorted so that little is padded, and what is padded is masked.

Padding is on the right, where a causal model's real tokens never see it; the mask is for the statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from awq.errors import CalibrationError, ConfigError


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples that run together.

    Args:
        input_ids: int64 `[batch, tokens]`, padded on the right with each sample's own last token.
        mask: bool `[batch, tokens]`, True at real tokens; None when nothing is padded.
        index: which sample each row is.
        more: what the model is given beside them (pixels, positions, …).
    """

    input_ids: Tensor
    mask: Tensor | None
    index: tuple[int, ...]
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        mask = None if self.mask is None else self.mask.long()
        return {**self.more, "input_ids": self.input_ids, "attention_mask": mask}


def make_batches(samples: Sequence[Tensor], *, batch_tokens: int) -> list[Batch]:
    """Put samples of similar length together, longest first; the same input gives the same batches.

    Args:
        samples: int64 `[tokens]` each, none empty.
        batch_tokens: most tokens of a batch, padding counted; a batch of one sample is always allowed.

    Raises:
        CalibrationError: a sample is empty.
        ConfigError: `batch_tokens` is below 1.
    """
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens} must be at least 1")
    empty = [i for i, sample in enumerate(samples) if not len(sample)]
    if empty:
        raise CalibrationError(f"sample {empty[0]} holds no tokens; leave empty samples out")
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i]), i))
    batches: list[Batch] = []
    members: list[int] = []
    for index in order:
        # Sorted by falling length: the first member is the longest, and decides the width of all.
        if members and (len(members) + 1) * len(samples[members[0]]) > batch_tokens:
            batches.append(_batch(samples, members))
            members = []
        members.append(index)
    if members:
        batches.append(_batch(samples, members))
    return batches


def _batch(samples: Sequence[Tensor], members: list[int]) -> Batch:
    lengths = torch.tensor([len(samples[i]) for i in members])
    width = int(lengths.max())
    # Padding repeats a token of the sample: behind a mask any id will do, as long as the model knows it.
    rows = [torch.cat([samples[i], samples[i][-1:].expand(width - len(samples[i]))]) for i in members]
    mask = torch.arange(width) < lengths.unsqueeze(1)
    return Batch(torch.stack(rows), None if bool(mask.all()) else mask, tuple(members))

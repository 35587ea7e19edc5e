"""Samples of any length side by side: sorted so that little is padded, and what is padded is masked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples that run together.

    Args:
        input_ids: int64 `[batch, tokens]`, padded on the right (a causal model's real tokens never see it).
        mask: bool `[batch, tokens]`, True at real tokens; None when nothing is padded.
        index: which sample each row is.
    """

    input_ids: Tensor
    mask: Tensor | None
    index: tuple[int, ...]


def make_batches(samples: Sequence[Tensor], *, batch_tokens: int) -> list[Batch]:
    """Put samples of similar length together.

    Args:
        samples: int64 `[tokens]` each.
        batch_tokens: most tokens of a batch, padding counted; one sample always fits.
    """
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i]), i))
    batches: list[Batch] = []
    members: list[int] = []
    for index in order:
        # Sorted by falling length: the first member is the longest, and decides what padding would cost.
        longest = len(samples[members[0]]) if members else 0
        if members and (len(members) + 1) * longest > batch_tokens:
            batches.append(_batch(samples, members))
            members = []
        members.append(index)
    if members:
        batches.append(_batch(samples, members))
    return batches


def _batch(samples: Sequence[Tensor], members: list[int]) -> Batch:
    lengths = torch.tensor([len(samples[i]) for i in members])
    # Padding repeats a token of the sample: any id is right behind a mask, as long as the model has it.
    width = int(lengths.max())
    rows = [torch.cat([samples[i], samples[i][-1:].expand(width - len(samples[i]))]) for i in members]
    mask = torch.arange(width) < lengths.unsqueeze(1)
    return Batch(torch.stack(rows), None if bool(mask.all()) else mask, tuple(members))

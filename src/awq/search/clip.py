"""Narrower ranges: a few large weights need not decide the step of their whole group.

For each row and group the error is δᵀ G_gg δ, with the group's own diagonal block of G: every token counts.
The two ends are searched separately, since weights are rarely symmetric: first both together as the paper
does (arXiv 2306.00978, section 4), then the low end alone around that, then the high end alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq.search.gram import InputStats
from awq.search.rounding import fake_quantize, full_range

# Weights searched together: on a processor few enough for its caches, on an accelerator many for its width.
_CPU_WEIGHTS, _DEVICE_WEIGHTS = 1 << 18, 1 << 25
# Where each end is sought around the best common shrinking, in steps.
_OFFSETS = (-4, -2, -1, 1, 2, 4)


def search_clip(
    weight: Tensor,
    stats: InputStats,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    symmetric: bool = False,
    steps: int = 10,
    shrink: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The best range of each group, `(low, high)`, float32 `[out, groups]`; never worse than the full range.

    Args:
        weight: float32 `[out, in]`, scales already folded in.
        stats: what the layer sees, scales already folded in.
        symmetric: every zero point is the middle code.
        steps: candidates for each end, evenly from the full range down to `1 - shrink` of it (exclusive).
        shrink: the largest part of an end that may be cut off.
    """
    blocks = stats.diagonal_blocks(group_size)
    ratios = [1 - shrink * k / steps for k in range(steps)]
    together = _CPU_WEIGHTS if weight.device.type == "cpu" else _DEVICE_WEIGHTS
    parts = weight.split(max(8, together // weight.shape[1]))
    pieces = [_search_rows(rows, blocks, bits, group_size, dtype, symmetric, ratios) for rows in parts]
    lows, highs = zip(*pieces, strict=True)
    return torch.cat(lows), torch.cat(highs)


def _search_rows(
    weight: Tensor,
    blocks: Tensor,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    symmetric: bool,
    ratios: list[float],
) -> tuple[Tensor, Tensor]:
    low, high = full_range(weight, group_size)

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        delta = fake_quantize(weight, lo, hi, bits, dtype, symmetric).sub_(weight)
        grouped = delta.view(weight.shape[0], -1, group_size).transpose(0, 1)
        return (torch.bmm(grouped, blocks) * grouped).sum(-1).t().contiguous()

    best = error(low, high)
    index = torch.zeros_like(low)
    for k, ratio in enumerate(ratios[1:], 1):
        loss = error(low * ratio, high * ratio)
        better = loss < best
        best = torch.where(better, loss, best)
        index = torch.where(better, torch.full_like(index, k), index)
    spacing = ratios[0] - ratios[1] if len(ratios) > 1 else 0.0
    start = 1 - spacing * index
    ends = [start, start.clone()]
    for end in (0, 1):
        for offset in _OFFSETS:
            trial = (start + offset * spacing).clamp(min=ratios[-1], max=1.0)
            pair = [trial if side == end else ends[side] for side in (0, 1)]
            loss = error(low * pair[0], high * pair[1])
            better = loss < best
            best = torch.where(better, loss, best)
            ends[end] = torch.where(better, trial, ends[end])
    return low * ends[0], high * ends[1]

"""Narrower ranges: a few large weights need not decide the step of their whole group.

For each row and group the error is δᵀ G_gg δ, with the group's own diagonal block of G: every token counts.
The two ends are searched separately, since weights are rarely symmetric: first both together as the paper
does (arXiv 2306.00978, section 4), then the low end alone, then the high end alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq.search.gram import InputStats
from awq.search.rounding import fake_quantize, full_range

# Rows searched together: bounds the temporaries to a few times this many rows.
_ROWS = 1024


def search_clip(
    weight: Tensor,
    stats: InputStats,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    steps: int = 10,
    shrink: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The best range of each group, `(low, high)`, float32 `[out, groups]`; never worse than the full range.

    Args:
        weight: float32 `[out, in]`, scales already folded in.
        stats: what the layer sees, scales already folded in.
        steps: candidates for each end, evenly from the full range down to `1 - shrink` of it (exclusive).
        shrink: the largest part of an end that may be cut off.
    """
    blocks = stats.diagonal_blocks(group_size)
    ratios = [1 - shrink * k / steps for k in range(steps)]
    pieces = [_search_rows(rows, blocks, bits, group_size, dtype, ratios) for rows in weight.split(_ROWS)]
    lows, highs = zip(*pieces, strict=True)
    return torch.cat(lows), torch.cat(highs)


def _search_rows(
    weight: Tensor, blocks: Tensor, bits: int, group_size: int, dtype: torch.dtype, ratios: list[float]
) -> tuple[Tensor, Tensor]:
    low, high = full_range(weight, group_size)

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        delta = fake_quantize(weight, lo, hi, bits, dtype).sub_(weight)
        grouped = delta.view(weight.shape[0], -1, group_size).transpose(0, 1)
        return (torch.bmm(grouped, blocks) * grouped).sum(-1).t().contiguous()

    best_low, best_high = low, high
    best = error(low, high)
    for ends in ((True, True), (True, False), (False, True)):
        fixed_low, fixed_high = best_low, best_high
        for ratio in ratios:
            try_low = low * ratio if ends[0] else fixed_low
            try_high = high * ratio if ends[1] else fixed_high
            loss = error(try_low, try_high)
            better = loss < best
            best = torch.where(better, loss, best)
            best_low = torch.where(better, try_low, best_low)
            best_high = torch.where(better, try_high, best_high)
    return best_low, best_high

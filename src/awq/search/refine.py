"""Better codes and scales after GPTQ, in the same storage format, from the same statistics.

Two steps take turns, and neither ever makes tr(ΔW G ΔWᵀ) larger:

- *Refit*: with the codes fixed, a row's values are linear in its groups' scales, so the best scales are the
  solution of one small linear system for each row (in place of ranges that were chosen group by group).
- *Descent*: with the scales fixed, each code in turn moves to the value that is best given all others
  (coordinate descent). GPTQ visits every channel once and cannot take a decision back; this can.

G is damped as it is for GPTQ, so that what is fitted are the tokens at large and not the ones that were seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from awq.search.gram import InputStats, output_error
from awq.search.rounding import DAMPING, Codes, along_rows, visiting_order

# Channels whose codes move before the effect on all others is brought up to date.
_PANEL = 128
# Floats of the largest intermediate of a refit, and rows that fill a processor: more would only take memory.
_FLOATS, _CPU_ROWS = 1 << 26, 128
# Moves the codes of a panel, as `move_panel` below.
Mover = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def refine(
    weight: Tensor, stats: InputStats, codes: Codes, bits: int, rounds: int, mover: Mover | None = None
) -> Codes:
    """Refit the scales and descend, `rounds` times.

    Args:
        weight: float32 `[out, in]`.
        stats: what the layer saw.
        codes: where to start.
        rounds: how often; gains halve from one to the next.
        mover: moves the codes of a panel; on some devices another than this module's is faster.
    """
    stats = dataclasses.replace(stats, gram=damped(stats.gram))
    for _ in range(rounds):
        codes = _refitted(weight, stats, codes)
        codes = _descended(weight, stats.gram, codes, 2**bits - 1, mover or move_panel)
    return codes


def damped(gram: Tensor) -> Tensor:
    """`gram` `[parts, width, width]` with a small share of its mean diagonal added to the diagonal."""
    gram = gram.clone()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += DAMPING * diagonal.mean(1, keepdim=True)
    return gram


def move_panel(codes: Tensor, slope: Tensor, gram: Tensor, scales: Tensor, levels: int) -> Tensor:
    """Move the codes of a panel of channels, one channel after another, to where they do best.

    Args:
        codes: float32 `[channels, out]`, moved in place.
        slope: float32 `[channels, out]`, half the gradient of the error with respect to the values; used up.
        gram: float32 `[channels, channels]`, the panel's part of G.
        scales: float32 `[channels, out]`.

    Returns:
        By how much the values changed, float32 `[channels, out]`.
    """
    moves = torch.empty_like(slope)
    diagonal = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
    for i in range(codes.shape[0]):
        best = codes[i] - slope[i] / (scales[i] * diagonal[i])
        best = best.round_().clamp_(0, levels)
        moves[i] = (best - codes[i]).mul_(scales[i])
        codes[i] = best
        slope.addr_(gram[i], moves[i])
    return moves


def _descended(weight: Tensor, grams: Tensor, start: Codes, levels: int, mover: Mover) -> Codes:
    size = weight.shape[1] // start.scales.shape[1]
    out = torch.empty_like(start.codes)
    parts, width, _ = grams.shape
    for part in range(parts):
        order = visiting_order(grams[part])
        gram = grams[part][order][:, order]
        columns = order + part * width
        scales, zeros = (along_rows(t.float(), columns // size) for t in start[1:])
        codes = along_rows(start.codes, columns).float()
        error = (codes - zeros).mul_(scales).sub_(along_rows(weight, columns))
        slope = gram @ error
        del zeros, error
        for begin in range(0, width, _PANEL):
            here = slice(begin, begin + _PANEL)
            panel = slope[here].clone()
            moves = mover(codes[here], panel, gram[here, here].contiguous(), scales[here], levels)
            slope.addmm_(gram[:, here], moves)
        out[:, columns] = codes.t().to(torch.uint8)
    return Codes(out, start.scales, start.zeros)


def _refitted(weight: Tensor, stats: InputStats, start: Codes) -> Codes:
    grams = stats.gram
    parts, width, _ = grams.shape
    groups = start.scales.shape[1] // parts
    rows = max(1, _FLOATS // groups**2)
    scales = torch.cat(
        [
            torch.cat(
                [
                    _best_scales(values, codes, zeros, old, grams[part])
                    for values, codes, zeros, old in zip(
                        weight[:, part * width : (part + 1) * width].split(rows),
                        start.codes[:, part * width : (part + 1) * width].split(rows),
                        start.zeros[:, part * groups : (part + 1) * groups].split(rows),
                        start.scales[:, part * groups : (part + 1) * groups].split(rows),
                        strict=True,
                    )
                ]
            )
            for part in range(parts)
        ],
        dim=1,
    )
    new = Codes(start.codes, scales, start.zeros)
    after, before = (output_error(codes.values() - weight, stats) for codes in (new, start))
    better = after < before
    return Codes(start.codes, torch.where(better.unsqueeze(1), scales, start.scales), start.zeros)


def _best_scales(weight: Tensor, codes: Tensor, zeros: Tensor, old: Tensor, gram: Tensor) -> Tensor:
    """Scales `[rows, groups]` that minimise the error of each row of `weight` `[rows, width]`.

    With U the codes less their zero points, one block of columns for each group, the error is
    (w - U s)ᵀ G (w - U s), so that UᵀGU s = UᵀGw.
    """
    groups, width = old.shape[1], gram.shape[0]
    normal, target = weight.new_empty(len(weight), groups, groups), weight.new_empty(len(weight), groups)
    # In pieces, for `spread` is large; all rows are solved for at once, as solvers wait for a GPU each time.
    most = _CPU_ROWS if weight.device.type == "cpu" else len(weight)
    rows = max(1, min(most, _FLOATS // (width * groups)))
    for begin in range(0, len(weight), rows):
        here = slice(begin, begin + rows)
        units = codes[here].reshape(-1, groups, width // groups).float() - zeros[here].unsqueeze(-1).float()
        spread = torch.einsum("xgs,rgs->rxg", gram.view(width, groups, -1), units)
        normal[here] = torch.einsum("rhs,rhsg->rhg", units, spread.view(len(units), groups, -1, groups))
        target[here] = torch.einsum("rgs,rgs->rg", units, (weight[here] @ gram).view_as(units))
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(gram.dtype).tiny
    solved, failed = torch.linalg.solve_ex(normal, target.unsqueeze(-1))
    scales = solved.squeeze(-1)
    # A group of zeros has no best scale, and a wild one would be of no use to the next step.
    sane = (scales > 0.25 * old.float()) & (scales < 4 * old.float()) & (failed == 0).unsqueeze(1)
    return torch.where(sane, scales, old.float()).to(old.dtype)

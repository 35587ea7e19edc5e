"""The scale search: how much of each input channel's magnitude to move into the weights.

The grid is the paper's (arXiv 2306.00978): s = mean|x|^r, and AutoAWQ's variant s = mean|x|^r / mean|w|^(1-r)
("duo scaling"), each normalised to be centred on one. The identity is always a candidate, so the result is
never worse than no scaling by the measure used here.

That measure is the sum over the consumers of tr(ΔW G ΔWᵀ), exact for each layer's own output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from awq.config import Setting
from awq.search.gram import InputStats, output_error
from awq.search.rounding import fake_quantize, full_range


@dataclasses.dataclass(frozen=True)
class ScaleGrid:
    """Which scales to try, and at which precision to judge them.

    Args:
        bits: width of a code.
        group_size: input channels that share a scale.
        dtype: storage dtype of the quantization scales.
        steps: exponents, evenly from 0 to 1 (exclusive).
        duo: also try scales that take the weights' magnitude into account.
        symmetric: every zero point is the middle code.
    """

    bits: int
    group_size: int
    dtype: torch.dtype
    steps: int = 20
    duo: bool = True
    symmetric: bool = False


@dataclasses.dataclass(frozen=True)
class ScaleChoice:
    """The best scale found.

    Args:
        scale: float32 `[free]`, one value per free row of the producer.
        loss: summed mean squared output error of the consumers with it.
        identity_loss: the same without scaling.
        label: how the scale was made, for the report: `identity`, `plain 0.35`, `duo 0.60`.
    """

    scale: Tensor
    loss: float
    identity_loss: float
    label: str


def search_scale(
    weights: list[Tensor],
    stats: InputStats,
    grid: ScaleGrid,
    tie: Tensor,
    settings: Sequence[Setting] | None = None,
) -> ScaleChoice:
    """Search the scale of a producer's rows by the error of the layers that read them.

    Args:
        weights: float32 `[out_i, in]`, the consumers' weights.
        stats: statistics of their common input.
        grid: candidates and precision.
        tie: int64 `[in]`, the producer's free row behind each input channel; -1 where there is none, which
            keeps the channel's scale at 1. Under grouped-query attention several channels share a row.
        settings: width and group size of each weight, where they are not all the grid's.
    """
    settings = settings or [Setting(grid.bits, grid.group_size)] * len(weights)
    sizes = [setting.size(weights[0].shape[1]) for setting in settings]
    free = int(tie.max()) + 1
    x_mean = _tied_mean(stats.mean_abs, tie, free)
    w_mean = _tied_mean(_weight_mean(weights, sizes), tie, free)

    def loss_of(scale: Tensor) -> float:
        per_channel = expand(scale, tie)
        total = torch.zeros((), device=scale.device)
        for weight, setting, size in zip(weights, settings, sizes, strict=True):
            scaled = weight * per_channel
            low, high = full_range(scaled, size)
            values = fake_quantize(scaled, low, high, setting.bits, grid.dtype, grid.symmetric)
            total += output_error(values.sub_(scaled).div_(per_channel), stats).sum()
        return float(total)

    def candidate(mode: str, step: int) -> Tensor:
        exponent = step / grid.steps
        scale = x_mean.pow(exponent)
        if mode == "duo":
            scale = scale / (w_mean.pow(1 - exponent) + 1e-4)
        return _centred(scale)

    def judged(mode: str, step: int) -> float:
        return loss_of(candidate(mode, step))

    losses: dict[tuple[str, int], float] = {}
    for mode in ("plain", "duo") if grid.duo else ("plain",):
        found = _coarse_to_fine(grid.steps, partial(judged, mode))
        losses |= {(mode, step): loss for step, loss in found.items()}
    # The plain scale of exponent zero is the identity, and wins a tie.
    identity = losses["plain", 0]
    mode, step = min(losses, key=lambda key: (losses[key], key != ("plain", 0)))
    if (mode, step) == ("plain", 0):
        return ScaleChoice(torch.ones(free, device=x_mean.device), identity, identity, "identity")
    label = f"{mode} {step / grid.steps:.2f}"
    return ScaleChoice(candidate(mode, step), losses[mode, step], identity, label)


def _coarse_to_fine(steps: int, loss: Callable[[int], float]) -> dict[int, float]:
    """Judge every fourth exponent, then the neighbours of the best at distance two, then at one.

    The loss is smooth in the exponent but for rounding noise; the whole grid costs 2.5 times as much and
    finds scales that are no better beyond that noise.
    """
    losses = {step: loss(step) for step in range(0, steps, 4)}
    for distance in (2, 1):
        best = min(losses, key=lambda step: losses[step])
        near = (best - distance, best + distance)
        losses |= {step: loss(step) for step in near if 0 <= step < steps and step not in losses}
    return losses


def expand(scale: Tensor, tie: Tensor) -> Tensor:
    """A scale per free row as a scale per input channel, float32 `[in]`; 1 where there is no row."""
    return torch.where(tie >= 0, scale[tie.clamp_min(0)], torch.ones_like(scale[:1]))


def _centred(scale: Tensor) -> Tensor:
    """Guard zeros and centre on one in the logarithm; what is not finite becomes one."""
    scale = scale.clamp_min(1e-4)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))


def _weight_mean(weights: list[Tensor], sizes: Sequence[int]) -> Tensor:
    """Mean over rows of |w| relative to the largest in its group, `[in]`."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    rows = 0
    for weight, size in zip(weights, sizes, strict=True):
        grouped = weight.abs().view(weight.shape[0], -1, size)
        relative = grouped / (grouped.amax(-1, keepdim=True) + 1e-6)
        total += relative.view(weight.shape).sum(0)
        rows += weight.shape[0]
    return total / rows


def _tied_mean(values: Tensor, tie: Tensor, free: int) -> Tensor:
    """Mean of `values` `[in]` over the channels of each free row, `[free]`."""
    live = tie >= 0
    sums = torch.zeros(free, device=values.device).index_add_(0, tie[live], values[live])
    counts = torch.zeros(free, device=values.device).index_add_(0, tie[live], torch.ones_like(values[live]))
    return sums / counts.clamp_min(1)

"""What `study.py` measures: options of the product, and ingredients that are put in place of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from awq.pipeline import block as blocks
from awq.pipeline import folding, job, run, stacks
from awq.search import Codes, InputStats, clip, rounding, scale
from study_ingredients import bias_corrected, by_exact_outputs, weighted_by_gradient

# `awq.search` has a function of that name.
refining = import_module("awq.search.refine")

# Changes made before a run and taken back behind it, given the model's folder and the calibration samples.
Patch = Callable[[Path, Tensor], Any]


calls = count()


def increasing(*args: Any, **kwargs: Any) -> float:
    """More with each call: the scaled weight is asked about first, and so is the better one."""
    return float(next(calls))


@dataclasses.dataclass(frozen=True)
class Variant:
    """Options that differ from the defaults, and what else is put in place.

    Weights are not corrected unless the options say so, and scales are kept if they help plain rounding: that
    they have to help behind compensation too is an ingredient of its own, `judged`.
    """

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    patches: tuple[Patch, ...] = ()
    judged: bool = False

    @contextmanager
    def in_place(self, folder: Path, samples: Tensor) -> Iterator[None]:
        """Within a `with` block the product works this way."""
        with ExitStack() as stack:
            if not self.judged:
                stack.enter_context(patch.object(folding, "_compensated", increasing))
            for each in self.patches:
                stack.enter_context(each(folder, samples))
            yield


def replaced(module: Any, name: str, value: Any) -> Patch:
    """A name of a module stands for something else."""
    return lambda folder, samples: patch.object(module, name, value)


def only_duo(steps: int, loss: Any, search: Any = scale._coarse_to_fine) -> dict[int, float]:
    """Of the plain grid, the identity alone."""
    return {0: loss(0)} if loss.args == ("plain",) else search(steps, loss)


def whole_grid(steps: int, loss: Callable[[int], float]) -> dict[int, float]:
    """Every exponent."""
    return {step: loss(step) for step in range(steps)}


def group_exponents(
    weights: list[Tensor], stats: InputStats, grid: Any, tie: Tensor, settings: Any = None
) -> scale.ScaleChoice:
    """The product's choice, then every group of input channels with more or less of its own magnitude."""
    found = search_scale(weights, stats, grid, tie, settings)
    size = weights[0].shape[1] if grid.group_size == -1 else grid.group_size

    def loss(trial: Tensor) -> float:
        total = 0.0
        for weight in weights:
            wide = weight * scale.expand(trial, tie)
            values = rounding.fake_quantize(wide, *rounding.full_range(wide, size), grid.bits, grid.dtype)
            change = (values - wide) / scale.expand(trial, tie)
            total += float(stacks.output_error(change, stats).sum())
        return total

    magnitude = scale._tied_mean(stats.mean_abs, tie, len(found.scale)).clamp_min(1e-8)
    best, least = found.scale, loss(found.scale)
    for begin in range(0, len(tie), size):
        here = torch.zeros(len(best))
        here[tie[begin : begin + size].clamp_min(0)] = 1
        for exponent in (-0.2, -0.1, -0.05, 0.05, 0.1, 0.2):
            trial = best * (magnitude / magnitude.log().mean().exp()) ** (exponent * here)
            if (error := loss(trial)) < least:
                best, least = trial, error
    return dataclasses.replace(found, scale=best, loss=least, label=f"{found.label}, by group")


search_scale = folding.search_scale


def untied(*args: Any, **kwargs: Any) -> blocks.BlockResult:
    """No fold of one row into several channels, as v_proj → o_proj is under grouped-query attention."""
    args = list(args)
    args[3] = [fold for fold in args[3] if fold.tie.unique().numel() == fold.tie.numel()]
    return quantize_block(*args, **kwargs)


quantize_block = run.quantize_block


def file_order(gram: Tensor) -> Tensor:
    """Channels as they come."""
    return torch.arange(len(gram), device=gram.device)


def order_inside_groups(gram: Tensor, size: int) -> Tensor:
    """Groups as they come, the most energetic channel of each first; as a whole what has no such groups."""
    size = size if len(gram) % size == 0 else len(gram)
    inside = torch.argsort(gram.diagonal().view(-1, size), descending=True, stable=True)
    return (inside + size * torch.arange(len(inside), device=gram.device).unsqueeze(1)).flatten()


def uncompensated(weight: Tensor, stats: Any, low: Tensor, high: Tensor, *args: Any) -> Codes:
    """Rounding to nearest where GPTQ would be, so that what comes behind it can be seen alone."""
    bits, dtype, _, symmetric = args
    return rounding.nearest(weight, low, high, bits, dtype, symmetric)


def estimated(
    weight: Tensor, stats: InputStats, codes: Codes, bits: int, rounds: int, mover: Any = None
) -> Codes:
    """Scales by weighted least squares, then every weight to its nearest code again (as NNCF does)."""
    stats = dataclasses.replace(stats, gram=refining.damped(stats.gram))
    for _ in range(rounds):
        codes = refining._refitted(weight, stats, codes)
        grouped = weight.view(*codes.scales.shape, -1) / codes.scales.float().unsqueeze(-1)
        near = (grouped.round() + codes.zeros.unsqueeze(-1)).clamp_(0, 2**bits - 1)
        codes = Codes(near.view(weight.shape).to(torch.uint8), codes.scales, codes.zeros)
    return refining._refitted(weight, stats, codes)


_NO_SCALES: dict[str, Any] = {"scale_steps": 1, "duo_scaling": False}
_CORRECTED: dict[str, Any] = {"correction": True}
_SYMMETRIC = replaced(clip, "_OFFSETS", ())
_DUO = replaced(scale, "_coarse_to_fine", only_duo)
_UNTIED = replaced(run, "quantize_block", untied)
_UNCOMPENSATED = replaced(stacks, "gptq", uncompensated)


def _ordered(order: Callable[[Tensor], Tensor]) -> tuple[Patch, ...]:
    return replaced(rounding, "visiting_order", order), replaced(refining, "visiting_order", order)


def _followed(one_of: int) -> Patch:
    return replaced(job, "_FOLLOWED", one_of)


VARIANTS: dict[str, Variant] = {
    "plain rounding": Variant({"method": "rtn"}),
    "plain rounding, biases corrected": Variant({"method": "rtn"}, (bias_corrected,)),
    "scales alone": Variant({"clip": False, "rounding": "nearest"}),
    "scales alone, duo grid": Variant({"clip": False, "rounding": "nearest"}, (_DUO,)),
    "scales alone, exact outputs": Variant({"clip": False, "rounding": "nearest"}, (by_exact_outputs,)),
    "scales alone, plain grid": Variant({"clip": False, "rounding": "nearest", "duo_scaling": False}),
    "ranges alone": Variant({**_NO_SCALES, "rounding": "nearest"}),
    "ranges alone, symmetric": Variant({**_NO_SCALES, "rounding": "nearest"}, (_SYMMETRIC,)),
    "compensation alone": Variant({**_NO_SCALES, "clip": False, "rounding": "gptq", "refine": 0}),
    "compensation and refining": Variant({**_NO_SCALES, "clip": False, "rounding": "gptq"}),
    "AutoAWQ's scales and ranges, by Gram matrices": Variant(
        {"rounding": "nearest"}, (_DUO, _SYMMETRIC, _UNTIED)
    ),
    "AutoAWQ's scales and ranges, by exact outputs": Variant(
        {"rounding": "nearest"}, (_DUO, _SYMMETRIC, _UNTIED, by_exact_outputs)
    ),
    "scales and ranges (preset fast)": Variant({"rounding": "nearest"}),
    "scales and ranges, exact outputs": Variant({"rounding": "nearest"}, (by_exact_outputs,)),
    "scales and ranges, biases corrected": Variant({"rounding": "nearest"}, (bias_corrected,)),
    "scales, ranges, scale estimation": Variant(
        {"rounding": "gptq", "refine": 2}, (_UNCOMPENSATED, replaced(stacks, "refine", estimated))
    ),
    "all but compensation": Variant({"rounding": "gptq"}, (_UNCOMPENSATED,)),
    "all but refining": Variant({"refine": 0}),
    "all but scales": Variant(_NO_SCALES),
    "all but duo scales": Variant({"duo_scaling": False}),
    "all but plain scales": Variant({}, (_DUO,)),
    "all but tied v→o": Variant({}, (_UNTIED,)),
    "all but ranges": Variant({"clip": False}),
    "all, symmetric ranges": Variant({}, (_SYMMETRIC,)),
    "all, channels in file order": Variant({}, _ordered(file_order)),
    "all, ordered inside groups of 128": Variant({}, _ordered(partial(order_inside_groups, size=128))),
    "all": Variant(),
    "refining once": Variant({"refine": 1}),
    "refining 4 times": Variant({"refine": 4}),
    "refining 8 times": Variant({"refine": 8}),
    "every exponent of the grid": Variant({}, (replaced(scale, "_coarse_to_fine", whole_grid),)),
    "twice as fine a grid": Variant({"scale_steps": 40}),
    "exponents for each group": Variant({}, (replaced(folding, "search_scale", group_exponents),)),
    "all, exact outputs": Variant({}, (by_exact_outputs,)),
    "all, biases corrected": Variant({}, (bias_corrected,)),
    "tokens weighted by gradient": Variant({}, (weighted_by_gradient,)),
    "scales judged": Variant(judged=True),
    "corrections": Variant(_CORRECTED),
    "scales judged, corrections (preset balanced)": Variant(_CORRECTED, judged=True),
    "scales judged, corrections, an eighth of the samples": Variant(_CORRECTED, (_followed(8),), judged=True),
    "scales judged, corrections, half of the samples": Variant(_CORRECTED, (_followed(2),), judged=True),
    "scales judged, corrections, all samples": Variant(_CORRECTED, (_followed(1),), judged=True),
    "tuning, 160 steps": Variant({"refine": 4, "tune": 160}),
    "scales judged, tuning, 160 steps (preset best)": Variant({"refine": 4, "tune": 160}, judged=True),
    "scales judged, corrections, tuning": Variant(_CORRECTED | {"refine": 4, "tune": 160}, judged=True),
    "tuning, 400 steps": Variant({"refine": 4, "tune": 400}),
}

"""Folds: the scale that is searched for each, and whether it does any good behind error compensation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from awq.config import QuantConfig, Setting
from awq.model.invariance import apply
from awq.model.layers import Fold, linears_of, scale_rows
from awq.pipeline.stacks import Way, round_weight
from awq.search import InputStats, ScaleGrid, output_error, search_scale
from awq.search.scale import expand

# Rows of each weight, evenly taken, by which scales are judged.
_JUDGED_ROWS = 256


def fold_in(
    block: nn.Module,
    fold: Fold,
    layers: Mapping[str, Setting],
    stats: dict[str, InputStats],
    first_of: Mapping[str, str],
    config: QuantConfig,
    scale_dtype: torch.dtype,
    stored_dtypes: Mapping[str, torch.dtype],
) -> str:
    """Search a fold's scale, fold it in, and update the statistics; returns how the scale was made.

    A scale is found by the error of rounding to nearest. Where errors are compensated, it stays only if the
    error is smaller behind that as well.
    """
    linears = linears_of(block)
    by_input: dict[str, list[str]] = {}
    for name in fold.consumers:
        if name in layers:
            by_input.setdefault(first_of[name], []).append(name)
    if not by_input:
        return "none of its readers is quantized"

    def weights_of(names: list[str]) -> list[Tensor]:
        return [linears[name].weight.data for name in names]

    # Where readers have several inputs, the scale is made for the input of most weights.
    first, readers = max(by_input.items(), key=lambda item: sum(w.numel() for w in weights_of(item[1])))
    grid = ScaleGrid(
        *config.setting, scale_dtype, config.scale_steps, config.duo_scaling, not config.zero_point
    )
    settings = [layers[name] for name in readers]
    sampled = [_sampled(weight) for weight in weights_of(readers)]
    choice = search_scale(sampled, stats[first], grid, fold.tie, settings)
    if choice.label == "identity":
        return choice.label
    scale = storable(block.get_submodule(fold.producer), fold, choice.scale, stored_dtypes)
    columns = expand(scale, fold.tie)
    if config.rounding != "nearest":
        scaled = [weight * columns for weight in sampled]
        error = partial(_compensated, settings=settings, config=config, dtype=scale_dtype)
        if error(scaled, stats[first].divided(columns)) >= error(sampled, stats[first]):
            return "identity"
    apply(block, fold, scale)
    for name in by_input:
        stats[name] = stats[name].divided(columns)
    return choice.label


def _sampled(weight: Tensor) -> Tensor:
    return weight[:: -(-weight.shape[0] // _JUDGED_ROWS)]


def _compensated(
    weights: list[Tensor], stats: InputStats, settings: list[Setting], config: QuantConfig, dtype: torch.dtype
) -> float:
    """Output error of weights `[out, in]` with a common input, rounded as the layers will be."""
    config = dataclasses.replace(config, refine=0)
    alike: dict[Setting, list[Tensor]] = {}
    for weight, setting in zip(weights, settings, strict=True):
        alike.setdefault(setting, []).append(weight)
    total = 0.0
    for setting, members in alike.items():
        weight = torch.cat(members)
        codes = round_weight(weight, stats, setting, config, dtype, Way("gptq", config.clip))
        total += float(output_error(codes.values() - weight, stats).double().sum())
    return total


def storable(
    producer: nn.Module, fold: Fold, scale: Tensor, stored_dtypes: Mapping[str, torch.dtype]
) -> Tensor:
    """Nudge a scale so that a norm's divided weight is exactly what its storage dtype can hold.

    A bfloat16 norm weight is known to one part in 256 only; unless the consumers are multiplied by what was
    really divided, that rounding would remain as an error in every channel.
    """
    weight = producer._parameters[fold.weight]
    assert weight is not None  # producers are found by their weight
    dtype = stored_dtypes.get(f"{fold.producer}.{fold.weight}".lstrip("."), torch.float32)
    if weight.dim() != 1 or dtype == torch.float32:
        return scale
    offset = 1.0 if fold.rule == "one_plus" else 0.0
    old = weight.data[fold.rows]
    new = scale_rows(old, True, fold.rule, 1 / scale).to(dtype).float()
    exact = (old + offset) / (new + offset)
    sane = torch.isfinite(exact) & ((exact / scale - 1).abs() < 0.02)
    return torch.where(sane, exact, scale)

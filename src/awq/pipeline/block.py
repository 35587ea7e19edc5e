"""Quantize one block: statistics in, codes out, judged against plain rounding.

The block's weights are float32 and in place. Nothing here knows of files or of other blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from awq.config import QuantConfig, Setting
from awq.kernels.triton_panel import mover_for, panel_for
from awq.model.invariance import apply
from awq.model.layers import Fold, Structure, linears_of, scale_rows
from awq.pipeline.observe import Batch
from awq.pipeline.precision import matmul_precision
from awq.search import (
    Codes,
    InputStats,
    ScaleGrid,
    full_range,
    gptq,
    nearest,
    output_error,
    refine,
    search_clip,
    search_scale,
)
from awq.search.rounding import round_panel
from awq.search.scale import expand

# Most weights of layers with a common input that are rounded together (float32: 1 GB).
_STACKED = 1 << 28
# Tokens on which candidates for a block are compared through the block itself.
_JUDGED_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class BlockResult:
    """What a block became.

    Args:
        codes: the quantized layers by name inside the block.
        chosen: `tuned`, `gptq`, `nearest` or `rtn`: whichever has the smallest error at the output.
        errors: mean squared error of each candidate's block output, relative to the block's own update.
        layers: for each quantized layer its relative output error, and plain rounding's.
        scales: how each fold's scale was found, by producer.
        dropped_rows: input rows left out of the statistics because they were not finite.
        approximate: layers whose statistics leave out correlations between far channels.
    """

    codes: dict[str, Codes]
    chosen: str
    errors: dict[str, float]
    layers: dict[str, dict[str, float]]
    scales: dict[str, str]
    dropped_rows: int
    approximate: list[str]

    def clipped(self, layer: str, weight: Tensor, config: QuantConfig) -> Tensor:
        """The float weight `[out, in]` of a layer inside the ranges that were searched for it.

        Where no range was searched, ranges are the weight's own and nothing is clipped.
        """
        if self.chosen == "rtn" or not config.clip:
            return weight
        _, scales, zeros = self.codes[layer]
        low = -zeros.float() * scales.float()
        high = (2**config.bits - 1 - zeros.float()) * scales.float()
        grouped = weight.view(*scales.shape, -1)
        return grouped.clamp(low.unsqueeze(-1), high.unsqueeze(-1)).view(weight.shape)


def quantize_block(
    block: nn.Module,
    reload: Callable[[], None],
    structure: Structure,
    folds: Sequence[Fold],
    layers: Mapping[str, Setting],
    stats: dict[str, InputStats],
    judge: Callable[[], float],
    config: QuantConfig,
    scale_dtype: torch.dtype,
    stored_dtypes: dict[str, torch.dtype],
    tuner: Callable[[dict[str, Codes]], dict[str, Codes]] | None = None,
) -> BlockResult:
    """Choose scales, ranges and codes for `layers`.

    The block is left with the float weights that the winning codes stand for: folded, or original when plain
    rounding won.

    Args:
        block: float32, original weights in place.
        reload: puts the original weights in place again.
        structure: shared inputs.
        folds: proven folds.
        layers: the layers to quantize, and to what.
        stats: statistics of the inputs under the original weights.
        judge: the block's relative output error as it stands.
        config: what to quantize to.
        scale_dtype: storage dtype of quantization scales.
        stored_dtypes: dtype on disk of each parameter that stays float, by name in the block.
        tuner: improves codes by the block's own output; its float weights are in place then.
    """
    linears = linears_of(block)
    first_of = {name: first for first, members in structure.inputs.items() for name in members}
    plain = _round(block, layers, stats, first_of, config, scale_dtype, False, ("nearest",))
    baseline = plain["nearest"]
    layer_errors = {
        name: {"rtn": _relative(linears[name].weight, baseline[name], stats[first_of[name]])}
        for name in layers
    }
    candidates = {"rtn": baseline}
    errors = {"rtn": _judged(block, baseline, judge)}
    scales: dict[str, str] = {}
    if config.method == "awq":
        reload()
        stats = dict(stats)
        for fold in folds:
            scales[fold.source] = _fold(
                block, fold, layers, stats, first_of, config, scale_dtype, stored_dtypes
            )
        folded = {name: parameter.data for name, parameter in block.named_parameters()}
        wanted = ("nearest", "gptq") if config.rounding == "auto" else (config.rounding,)
        found = _round(block, layers, stats, first_of, config, scale_dtype, config.clip, wanted)
        candidates |= found
        errors |= {rounding: _judged(block, codes, judge) for rounding, codes in found.items()}
        if tuner is not None:
            best = min(errors.keys() - {"rtn"}, key=lambda name: (errors[name], name))
            _restore(block, folded)
            candidates["tuned"] = tuner(candidates[best])
            errors["tuned"] = _judged(block, candidates["tuned"], judge)
    chosen = min(errors, key=lambda name: (errors[name], name))
    if chosen == "rtn":
        reload()
    else:
        _restore(block, folded)
        for name in layers:
            layer_errors[name]["awq"] = _relative(
                linears[name].weight, candidates[chosen][name], stats[first_of[name]]
            )
    return BlockResult(
        candidates[chosen],
        chosen,
        errors,
        layer_errors,
        scales if chosen != "rtn" else {},
        sum(s.dropped for s in stats.values()),
        sorted(name for name in layers if not stats[first_of[name]].exact),
    )


def make_judge(
    block: nn.Module, batches: Sequence[Batch], outputs: Sequence[Tensor], device: torch.device
) -> Callable[[], float]:
    """A function that tells the block's present error on some batches: |out - original|² / |original - in|².

    Batches are taken evenly until a few thousand tokens are covered.
    """
    tokens = sum(batch.hidden.shape[0] * batch.hidden.shape[1] for batch in batches)
    stride = max(1, tokens // _JUDGED_TOKENS)
    chosen = list(zip(batches, outputs, strict=True))[::stride]

    def judge() -> float:
        error = update = 0.0
        for batch, output in chosen:
            change, own = batch.against(batch.run(block, device), output)
            error += float(change.double().square().sum())
            update += float(own.double().square().sum())
        relative = error / max(update, 1e-300)
        return relative if math.isfinite(relative) else math.inf

    return judge


def _fold(
    block: nn.Module,
    fold: Fold,
    layers: Mapping[str, Setting],
    stats: dict[str, InputStats],
    first_of: dict[str, str],
    config: QuantConfig,
    scale_dtype: torch.dtype,
    stored_dtypes: dict[str, torch.dtype],
) -> str:
    """Search a fold's scale, fold it in, and update the statistics; returns how the scale was made."""
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
    choice = search_scale(weights_of(readers), stats[first], grid, fold.tie, settings)
    if choice.label == "identity":
        return choice.label
    scale = storable(block.get_submodule(fold.producer), fold, choice.scale, stored_dtypes)
    apply(block, fold, scale)
    for name in by_input:
        stats[name] = stats[name].divided(expand(scale, fold.tie))
    return choice.label


def storable(producer: nn.Module, fold: Fold, scale: Tensor, stored_dtypes: dict[str, torch.dtype]) -> Tensor:
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


def _round(
    block: nn.Module,
    layers: Mapping[str, Setting],
    stats: dict[str, InputStats],
    first_of: dict[str, str],
    config: QuantConfig,
    dtype: torch.dtype,
    clip: bool,
    roundings: Sequence[str],
) -> dict[str, dict[str, Codes]]:
    """Codes of every layer for each of the `roundings`, `{rounding: {layer: codes}}`.

    Layers that share an input are stacked: rows are independent of one another.
    """
    linears, symmetric = linears_of(block), not config.zero_point
    out: dict[str, dict[str, Codes]] = {rounding: {} for rounding in roundings}
    for first, members in _stacks(linears, layers, first_of):
        weight = torch.cat([linears[name].weight.data for name in members])
        bits, size = layers[members[0]].bits, layers[members[0]].size(weight.shape[1])
        seen = stats[first]
        if clip and seen.tokens:
            low, high = search_clip(weight, seen, bits, size, dtype, symmetric=symmetric)
        else:
            low, high = full_range(weight, size)
        rows = [linears[name].out_features for name in members]
        for rounding in roundings:
            if rounding == "gptq":
                panel = panel_for(weight.device) or round_panel
                stacked = gptq(weight, seen, low, high, bits, dtype, panel, symmetric)
                mover = mover_for(weight.device)
                with matmul_precision("highest"):
                    stacked = refine(weight, seen, stacked, bits, config.refine, mover)
            else:
                stacked = nearest(weight, low, high, bits, dtype, symmetric)
            for name, *parts in zip(members, *(tensor.split(rows) for tensor in stacked), strict=True):
                out[rounding][name] = Codes(*parts)
    return out


def _stacks(
    linears: dict[str, nn.Linear], layers: Mapping[str, Setting], first_of: dict[str, str]
) -> Iterator[tuple[str, list[str]]]:
    """Layers with a common input that are quantized alike, as many at a time as may be stacked; with the
    first layer of that input."""
    together: dict[tuple[str, Setting], list[str]] = {}
    for name, setting in layers.items():
        together.setdefault((first_of[name], setting), []).append(name)
    for (first, _), members in together.items():
        stack: list[str] = []
        size = 0
        for name in members:
            weights = linears[name].weight.numel()
            if stack and size + weights > _STACKED:
                yield first, stack
                stack, size = [], 0
            stack.append(name)
            size += weights
        yield first, stack


def _judged(block: nn.Module, codes: dict[str, Codes], judge: Callable[[], float]) -> float:
    """The block's error with the values of `codes` in place; they stay there."""
    for name, layer in codes.items():
        block.get_submodule(name).weight.data = layer.values()
    return judge()


@contextmanager
def holding(block: nn.Module, codes: Mapping[str, Codes]) -> Iterator[None]:
    """Within a `with` block, the layers hold the values of `codes`."""
    kept = {name: block.get_submodule(name).weight.data for name in codes}
    try:
        for name, layer in codes.items():
            block.get_submodule(name).weight.data = layer.values()
        yield
    finally:
        for name, value in kept.items():
            block.get_submodule(name).weight.data = value


def _restore(block: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in block.named_parameters():
        parameter.data = values[name]


def _relative(weight: Tensor, codes: Codes, stats: InputStats) -> float:
    """Mean squared output error of a layer relative to its mean squared output."""
    error = float(output_error(codes.values() - weight.data, stats).double().sum())
    return error / max(float(output_error(weight.data, stats).double().sum()), 1e-300)


def report_of(result: BlockResult) -> dict[str, Any]:
    """The block's entry in the report, as JSON values."""
    return {
        "chosen": result.chosen,
        "error": result.errors[result.chosen],
        "errors": result.errors,
        "layers": result.layers,
        "scales": result.scales,
        "dropped_rows": result.dropped_rows,
        "approximate_statistics": result.approximate,
    }

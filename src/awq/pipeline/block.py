"""Quantize one block: statistics in, codes out, judged against plain rounding.

The block's weights are float32 and in place. Nothing here knows of files or of other blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awq.config import QuantConfig, Setting
from awq.model.layers import Fold, Structure, linears_of
from awq.pipeline.folding import fold_in
from awq.pipeline.observe import Batch
from awq.pipeline.stacks import Corrector, Rounded, Way, holding, relative_error, round_layers
from awq.search import Codes, InputStats

# Tokens on which candidates for a block are compared through the block itself.
_JUDGED_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class BlockResult:
    """What a block became.

    Args:
        codes: the quantized layers by name inside the block.
        chosen: `tuned`, `gptq`, `nearest` or `rtn`: whichever has the smallest error at the output.
        errors: mean squared error of each candidate's block output, relative to the block's own update. Where
            the quantized model is followed, on the inputs that it gives the block.
        layers: for each quantized layer its relative output error, and plain rounding's, each for the weight
            that was rounded.
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
    correct: Corrector | None = None,
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
        correct: changes weights before they are rounded; not for plain rounding.
        tuner: improves codes by the block's own output; its float weights are in place then.
    """
    linears = linears_of(block)
    first_of = {name: first for first, members in structure.inputs.items() for name in members}

    def rounded(way: Way, correct: Corrector | None = None) -> Rounded:
        return round_layers(block, layers, stats, first_of, config, scale_dtype, way, correct)

    found = {"rtn": rounded(Way("nearest", False))}
    errors = {"rtn": judged(block, found["rtn"].codes, judge)}
    scales: dict[str, str] = {}
    if config.method == "awq":
        stats = dict(stats)
        for fold in folds:
            scales[fold.source] = fold_in(
                block, fold, layers, stats, first_of, config, scale_dtype, stored_dtypes
            )
        first, *others = ("gptq", "nearest") if config.rounding == "auto" else (config.rounding,)
        found[first] = rounded(Way(first, config.clip), correct)
        errors[first] = judged(block, found[first].codes, judge)
        for other in others if errors[first] >= errors["rtn"] else ():
            found[other] = rounded(Way(other, config.clip), correct)
            errors[other] = judged(block, found[other].codes, judge)
        if tuner is not None:
            best = min(errors.keys() - {"rtn"}, key=lambda name: (errors[name], name))
            codes = tuner(found[best].codes)
            errors["tuned"] = judged(block, codes, judge)
            found["tuned"] = Rounded(
                codes,
                {
                    name: relative_error(linears[name].weight.data, layer, stats[first_of[name]])
                    for name, layer in codes.items()
                },
            )
    chosen = min(errors, key=lambda name: (errors[name], name))
    layer_errors = {name: {"rtn": error} for name, error in found["rtn"].errors.items()}
    if chosen == "rtn":
        reload()
    else:
        for name, error in found[chosen].errors.items():
            layer_errors[name]["awq"] = error
    return BlockResult(
        found[chosen].codes,
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
    tokens = sum(batch.tokens for batch in batches)
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


def judged(block: nn.Module, codes: Mapping[str, Codes], judge: Callable[[], float]) -> float:
    """The block's error with the values of `codes` in place."""
    with holding(block, codes):
        return judge()


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

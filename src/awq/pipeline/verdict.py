"""A run's verdict: figures of the saved checkpoint beside the original, and a plain sentence about them.

The thresholds for the KL divergence (nats per token, mean over held-out text) are chosen by what it bounds:
on average at most sqrt(KL / 2) of the probability goes to other tokens than the original's (Pinsker), 7 % for
0.01 and 16 % for 0.05. Perplexity may rise by 1 % and 5 %, noise allowed for. docs/evaluation.md has figures
to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from awq.calibration import CalibrationSet, HeldOut
from awq.config import QuantConfig
from awq.errors import StructureError
from awq.evaluate.divergence import Divergence
from awq.model import Skeleton
from awq.pipeline.report import BlockReport, Report, Verdict
from awq.pipeline.verify import Measured, compare_saved

# KL divergence and rise of the perplexity up to which a checkpoint is excellent, and good.
EXCELLENT = (0.01, 1.01)
GOOD = (0.05, 1.05)
# A block's own error on disk may be so many times what the search saw: other text, packed scales.
_ALIKE = 10.0
# Blocks and layers that are named.
_NAMED = 3


def verdict_on(
    out: Path,
    skeleton: Skeleton,
    list_name: str,
    text: Callable[[], HeldOut | None],
    report: Report,
    config: QuantConfig,
    calibration: CalibrationSet,
    device: torch.device,
) -> Verdict:
    """Compare a saved checkpoint with its original, and judge.

    Args:
        out: the checkpoint.
        skeleton, list_name: the original, opened, and its list of blocks.
        text: gives the text to judge by.
        report: of the run that made the checkpoint.
        config: what was quantized to.
        calibration: what was calibrated with.
        device: where the work is done.
    """
    found = text()
    if found is None:
        return unknown("there is no text to compare on")
    try:
        measured = compare_saved(skeleton, list_name, out, found, device)
    except StructureError as error:
        return unknown(str(error))
    return judge(measured, found, report.blocks, config, len(calibration.samples))


def unknown(reason: str) -> Verdict:
    """Nothing could be compared."""
    return Verdict("unknown", f"Not compared with the original: {reason}.")


def judge(
    measured: Measured, text: HeldOut, reports: Sequence[BlockReport], config: QuantConfig, samples: int
) -> Verdict:
    """The verdict.

    Args:
        measured: what was found.
        text: what it was found on.
        reports: the run's, block by block.
        config: what was quantized to.
        samples: calibration samples.
    """
    blocks: list[dict[str, Any]] = [dict(block) for block in measured.blocks]
    found = measured.divergence
    if found is None:
        return Verdict(
            "broken",
            f"Broken: the saved checkpoint gives NaN or infinity in {measured.broken}, on {text.source}. Do "
            "not use it; quantize again with --overwrite, and leave that block float (--skip NAME) if it "
            "happens again.",
            text.source,
            blocks=blocks,
        )
    grade = _grade(found)
    figures = (
        f"KL divergence from the original {found.kl:.4f} ± {found.kl_stderr:.4f} nats per token, perplexity "
        f"{found.perplexity.value:.3f} (original {found.reference_perplexity.value:.3f}), the same first "
        f"choice for {found.top1:.1%} of {found.tokens:,} tokens, on {text.source}."
    )
    words = {"excellent": "Excellent", "good": "Good", "poor": "Look at these layers"}[grade]
    sentence = f"{words}: {figures}"
    if grade == "poor":
        sentence = (
            f"{words}: {_worst(blocks, reports)}. {figures} {_advice(blocks, reports, config, samples)}"
        )
    return Verdict(
        grade,
        sentence,
        text.source,
        found.kl,
        found.kl_stderr,
        found.top1,
        found.top1_stderr,
        found.perplexity.value,
        found.perplexity.stderr,
        found.reference_perplexity.value,
        found.reference_perplexity.stderr,
        found.rise,
        found.rise_stderr,
        found.tokens,
        blocks,
    )


def _grade(found: Divergence) -> Literal["excellent", "good", "poor"]:
    noise = 0.0 if math.isnan(found.rise_stderr) else 2 * found.rise_stderr
    for grade, (kl, ratio) in (("excellent", EXCELLENT), ("good", GOOD)):
        if found.kl <= kl and found.rise - noise <= math.log(ratio):
            return grade  # type: ignore[return-value]
    return "poor"


def _worst(blocks: Sequence[Mapping[str, Any]], reports: Sequence[BlockReport]) -> str:
    """The blocks with the largest errors on disk, each with the layers that the search left worst."""
    of = {report.name: report for report in reports}
    first = sorted(blocks, key=lambda block: -block["error"])[:_NAMED]
    told = []
    for block in first:
        errors = _layers(of[block["name"]])
        layers = sorted(errors, key=lambda name: -errors[name])[:_NAMED]
        named = ", ".join(f"{name} {errors[name]:.1%}" for name in layers)
        told.append(f"{block['name']} with an error of {block['error']:.1%} ({named})")
    return "; ".join(told)


def _layers(report: BlockReport) -> dict[str, float]:
    """Relative output error of each quantized layer of a block, as the search left it."""
    return {name: each.get("awq", each["rtn"]) for name, each in report.outcome["layers"].items()}


def _advice(
    blocks: Sequence[Mapping[str, Any]],
    reports: Sequence[BlockReport],
    config: QuantConfig,
    samples: int,
) -> str:
    expected = {report.name: report.outcome["own_error"] for report in reports}
    strange = [b["name"] for b in blocks if b["error"] > _ALIKE * expected[b["name"]] + 1e-3]
    if strange and config.format != "folded":
        return (
            f"What is saved of {', '.join(strange[:_NAMED])} is much worse than what the search had found: "
            "the files may be damaged. Quantize again with --overwrite."
        )
    ways = []
    if config.target_bits is not None:
        ways.append(f"a larger budget (--target-bits {config.target_bits + 0.5:g})")
    elif config.bits < 4:
        ways.append("4 bits (--bits 4)")
    if config.method == "rtn":
        ways.append("--method awq")
    if config.group_size == -1 or config.group_size > 32:
        smaller = 128 if config.group_size == -1 else config.group_size // 2
        ways.append(f"smaller groups (--group-size {smaller})")
    if config.method != "rtn" and not config.tune:
        ways.append("--preset best")
    if samples < 128:
        ways.append("more calibration samples (--samples 128)")
    ways.append("leaving those layers float (--skip NAME)")
    return f"What helps: {', '.join(ways[:-1])}{' or ' if len(ways) > 1 else ''}{ways[-1]}."

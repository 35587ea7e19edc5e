"""Accuracy of plain rounding, AutoAWQ's procedure and OpenAWQ's presets: KL divergence and perplexity.

Everything in one run, on the same calibration tokens and the same evaluation tokens, evaluated in float32.
Seconds are those of this run, one method after another: for ratios that hold, see `speed.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from autoawq_reference import autoawq, plain_rounding, quantizable
from awq import QuantConfig
from awq.evaluate import Divergence, compare
from awq.pipeline import quantize
from common import Subject, add_subject_options, console, finish, subjects

PLAIN, THEIRS = "plain rounding", "AutoAWQ's procedure"
Made = tuple[Any, float]  # a quantized model with its values in place, and the seconds it took


def ours(subject: Subject, original: Any, bits: int, group_size: int, preset: str) -> Made:
    """The model as OpenAWQ writes and transformers reads it, in float32."""
    from transformers import AutoModelForCausalLM

    linears = [(name, m) for name, m in original.named_modules() if isinstance(m, torch.nn.Linear)]
    # The format for plain values takes any width; here the layers that no packed layout takes stay float.
    skip = tuple(name for name, layer in linears if not quantizable(layer, group_size))
    config = QuantConfig.preset(
        preset, bits=bits, group_size=group_size, format="float", dtype="float32", modules_to_not_convert=skip
    )
    with tempfile.TemporaryDirectory() as folder:
        report = quantize(
            subject.folder,
            Path(folder) / "out",
            config,
            [row.tolist() for row in subject.calibration],
            samples=len(subject.calibration),
            seq_len=subject.window,
            verify=False,
        )
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "out", dtype=torch.float32).eval()
    return model, report.seconds["total"]


@dataclasses.dataclass(frozen=True)
class Result:
    """How near a method came, and its seconds."""

    divergence: Divergence
    seconds: float


def measure(
    subject: Subject, settings: list[tuple[int, int]], presets: list[str]
) -> dict[str, dict[str, Result]]:
    """`{setting: {method: result}}`."""
    original, samples = subject.float_model(), subject.calibration
    results: dict[str, dict[str, Result]] = {}
    for bits, group_size in settings:
        models = {
            PLAIN: partial(rounded, original, bits, group_size),
            THEIRS: partial(procedure, original, samples, bits, group_size),
        } | {f"OpenAWQ {name}": partial(ours, subject, original, bits, group_size, name) for name in presets}
        setting = f"W{bits} g{group_size}"
        column = results.setdefault(setting, {})
        for name, make in models.items():
            model, seconds = make()
            divergence = compare(model, original, subject.evaluation, window=subject.window)
            column[name] = Result(divergence, seconds)
            console.print(
                f"{subject.name} {setting} {name}: KL {divergence.kl:.6f}, {seconds:.1f} s", style="dim"
            )
    return results


def rounded(original: Any, bits: int, group_size: int) -> Made:
    """Plain rounding, with its seconds."""
    started = time.perf_counter()
    return plain_rounding(original, bits, group_size), time.perf_counter() - started


def procedure(original: Any, samples: torch.Tensor, bits: int, group_size: int) -> Made:
    """AutoAWQ's procedure."""
    model, seconds = autoawq(original, samples, bits, group_size)
    return model, seconds["total"]


def show(subject: Subject, results: dict[str, dict[str, Result]]) -> None:
    """One table for each setting of a model."""
    for setting, column in results.items():
        table = Table(title=f"{subject.name} {setting}")
        for title in (
            "method",
            "KL ± standard error",
            "/ AutoAWQ",
            "same first token",
            "perplexity",
            "seconds",
        ):
            table.add_column(title, justify="left" if title == "method" else "right")
        first = column[PLAIN].divergence
        table.add_row("original", "0", "", "100.0 %", f"{first.reference_perplexity.value:.3f}", "")
        for method, result in column.items():
            got = result.divergence
            table.add_row(
                method,
                f"{got.kl:.5f} ± {got.kl_stderr:.5f}",
                f"{got.kl / column[THEIRS].divergence.kl:.2f}",
                f"{got.top1:.1%}",
                f"{got.perplexity.value:.3f}",
                f"{result.seconds:.1f}",
            )
        console.print(table)
    tokens = subject.calibration.numel()
    console.print(f"Calibration: {len(subject.calibration)} samples, {tokens:,} tokens.")
    console.print(f"Perplexity: {first.reference_perplexity.definition()}.")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_subject_options(parser, samples=128)
    parser.add_argument("--presets", default="fast,balanced,best", help="those of OpenAWQ to measure")
    parser.add_argument(
        "--settings", default="w4g128,w4g64,w4g32,w3g128", help="bits and group sizes for the bundled model"
    )
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for subject, settings in subjects(options, options.settings):
        results = measure(subject, settings, options.presets.split(","))
        show(subject, results)
        figures[subject.name] = {
            setting: {method: dataclasses.asdict(result) for method, result in column.items()}
            for setting, column in results.items()
        }
    finish(options, figures)


if __name__ == "__main__":
    main()

"""Accuracy of plain rounding, AutoAWQ's procedure and OpenAWQ: perplexity and KL divergence side by side.

Everything in one run, on the same calibration tokens and the same evaluation tokens, evaluated in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from autoawq_reference import autoawq, plain_rounding
from awq import QuantConfig
from awq.evaluate import Divergence, compare
from awq.pipeline import quantize
from common import Subject, add_subject_options, console, finish, subjects


def ours(subject: Subject, bits: int, group_size: int) -> Any:
    """The model as OpenAWQ writes and transformers reads it, in float32."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        config = QuantConfig(bits=bits, group_size=group_size, format="float", dtype="float32")
        out = Path(folder) / "out"
        quantize(
            subject.folder,
            out,
            config,
            [row.tolist() for row in subject.calibration],
            samples=len(subject.calibration),
            seq_len=subject.window,
        )
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def measure(subject: Subject, settings: list[tuple[int, int]]) -> dict[str, dict[str, Divergence]]:
    """`{setting: {method: result}}`."""
    original = subject.float_model()
    results: dict[str, dict[str, Divergence]] = {}
    for bits, group_size in settings:
        models = {
            "plain rounding": lambda b=bits, g=group_size: plain_rounding(original, b, g),
            "AutoAWQ's procedure": lambda b=bits, g=group_size: autoawq(original, subject.calibration, b, g)[
                0
            ],
            "OpenAWQ": lambda b=bits, g=group_size: ours(subject, b, g),
        }
        column = results.setdefault(f"W{bits} g{group_size}", {})
        for name, make in models.items():
            column[name] = compare(make(), original, subject.evaluation, window=subject.window)
            console.print(
                f"{subject.name} W{bits} g{group_size} {name}: KL {column[name].kl:.6f}", style="dim"
            )
    return results


def show(subject: Subject, results: dict[str, dict[str, Divergence]]) -> None:
    """The table of one model."""
    first = next(iter(next(iter(results.values())).values()))
    table = Table(title=f"{subject.name}: KL to the original ± standard error (perplexity)")
    table.add_column("method")
    for setting in results:
        table.add_column(setting, justify="right")
    reference = first.reference_perplexity
    table.add_row("original", *[f"0 ({reference.value:.3f})"] * len(results))
    for method in next(iter(results.values())):
        cells = [column[method] for column in results.values()]
        table.add_row(method, *[f"{c.kl:.5f} ± {c.kl_stderr:.5f} ({c.perplexity.value:.3f})" for c in cells])
    ratios = [column["OpenAWQ"].kl / column["AutoAWQ's procedure"].kl for column in results.values()]
    table.add_row("OpenAWQ / AutoAWQ", *[f"{ratio:.2f}" for ratio in ratios])
    console.print(table)
    tokens = subject.calibration.numel()
    console.print(f"Calibration: {len(subject.calibration)} samples, {tokens:,} tokens.")
    console.print(f"Perplexity: {reference.definition()}.")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_subject_options(parser, samples=128)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for subject, settings in subjects(options, "w4g128,w4g64,w4g32,w3g128"):
        results = measure(subject, settings)
        show(subject, results)
        figures[subject.name] = {
            setting: {method: dataclasses.asdict(result) for method, result in column.items()}
            for setting, column in results.items()
        }
    finish(options, figures)


if __name__ == "__main__":
    main()

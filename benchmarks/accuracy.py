"""Accuracy of plain rounding, AutoAWQ's procedure and OpenAWQ: perplexity and KL divergence side by side.

Everything in one run, on the same calibration tokens and the same evaluation tokens, evaluated in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
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


def ours(subject: Subject, original: Any, bits: int, group_size: int) -> Any:
    """The model as OpenAWQ writes and transformers reads it, in float32."""
    from transformers import AutoModelForCausalLM

    linears = [(name, m) for name, m in original.named_modules() if isinstance(m, torch.nn.Linear)]
    # The format for plain values takes any width; here the layers that no packed layout takes stay float.
    skip = tuple(name for name, layer in linears if not quantizable(layer, group_size))
    config = QuantConfig(
        bits=bits, group_size=group_size, format="float", dtype="float32", modules_to_not_convert=skip
    )
    with tempfile.TemporaryDirectory() as folder:
        quantize(
            subject.folder,
            Path(folder) / "out",
            config,
            [row.tolist() for row in subject.calibration],
            samples=len(subject.calibration),
            seq_len=subject.window,
            verify=False,
        )
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "out", dtype=torch.float32).eval()


def measure(subject: Subject, settings: list[tuple[int, int]]) -> dict[str, dict[str, Divergence]]:
    """`{setting: {method: result}}`."""
    original, samples = subject.float_model(), subject.calibration
    results: dict[str, dict[str, Divergence]] = {}
    for bits, group_size in settings:
        models = {
            "plain rounding": partial(plain_rounding, original, bits, group_size),
            "AutoAWQ's procedure": partial(procedure, original, samples, bits, group_size),
            "OpenAWQ": partial(ours, subject, original, bits, group_size),
        }
        setting = f"W{bits} g{group_size}"
        column = results.setdefault(setting, {})
        for name, make in models.items():
            column[name] = compare(make(), original, subject.evaluation, window=subject.window)
            console.print(f"{subject.name} {setting} {name}: KL {column[name].kl:.6f}", style="dim")
    return results


def procedure(original: Any, samples: torch.Tensor, bits: int, group_size: int) -> Any:
    """AutoAWQ's procedure, without its seconds."""
    return autoawq(original, samples, bits, group_size)[0]


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

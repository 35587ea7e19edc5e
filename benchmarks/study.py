"""What each ingredient of the search is worth: alone, left out of the whole, and added on top of it.

Every variant quantizes the same model from the same calibration tokens and is judged on the same held-out
text, with two choices of calibration samples; figures are the mean of both, and the standard error is that of
the evaluation windows. `docs/research/accuracy.md` keeps what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from awq import QuantConfig
from awq.evaluate import Divergence, compare
from awq.pipeline import quantize
from common import Subject, add_subject_options, console, finish, subjects

_NO_SCALES: dict[str, Any] = {"scale_steps": 1, "duo_scaling": False}
# Name: what differs from the default.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain rounding": {"method": "rtn"},
    "scales alone": {"clip": False, "rounding": "nearest"},
    "ranges alone": {**_NO_SCALES, "rounding": "nearest"},
    "compensation alone": {**_NO_SCALES, "clip": False, "rounding": "gptq", "refine": 0},
    "compensation and refining": {**_NO_SCALES, "clip": False, "rounding": "gptq"},
    "scales and ranges": {"rounding": "nearest"},
    "all but refining": {"refine": 0},
    "all but scales": _NO_SCALES,
    "all but duo scales": {"duo_scaling": False},
    "all but ranges": {"clip": False},
    "all (the default)": {},
    "refining once": {"refine": 1},
    "refining 4 times": {"refine": 4},
    "refining 8 times": {"refine": 8},
    "twice as fine a grid": {"scale_steps": 40},
    "tuning, 100 steps": {"refine": 4, "tune": 100},
    "tuning, 400 steps": {"refine": 4, "tune": 400},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_subject_options(parser, samples=256)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names, separated by commas")
    parser.add_argument("--settings", default="w4g128", help="bits and group sizes for the bundled model")
    parser.add_argument("--used", type=int, default=128, help="samples that one quantization uses")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for subject, settings in subjects(options, options.settings):
        original = subject.float_model()
        for bits, group_size in settings:
            title = f"{subject.name} W{bits} g{group_size}"
            table = Table(title=title)
            for column in ("variant", "KL ± standard error", "same first token", "perplexity", "seconds"):
                table.add_column(column, justify="left" if column == "variant" else "right")
            for name in options.variants.split(","):
                runs = [
                    measured(subject, original, samples, bits, group_size, VARIANTS[name])
                    for samples in choices(subject, options.used)
                ]
                table.add_row(name, *cells(runs))
                figures.setdefault(title, {})[name] = [
                    {**dataclasses.asdict(result), "seconds": seconds} for result, seconds in runs
                ]
                console.print(title, name, *cells(runs), style="dim")
            console.print(table)
    finish(options, figures)


def choices(subject: Subject, used: int) -> list[torch.Tensor]:
    """Two sets of calibration samples that have none in common, where there are enough."""
    samples = subject.calibration
    return [samples[:used], samples[-used:]]


def measured(
    subject: Subject,
    original: Any,
    samples: torch.Tensor,
    bits: int,
    group_size: int,
    options: dict[str, Any],
) -> tuple[Divergence, float]:
    """How near a variant comes, and the seconds it takes."""
    from transformers import AutoModelForCausalLM

    config = QuantConfig(bits=bits, group_size=group_size, format="float", dtype="float32", **options)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row.tolist() for row in samples]
        out = Path(folder) / "out"
        report = quantize(subject.folder, out, config, rows, samples=len(rows), seq_len=subject.window)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    result = compare(model, original, subject.evaluation, window=subject.window)
    return result, report.seconds["total"]


def cells(runs: list[tuple[Divergence, float]]) -> list[str]:
    """The means of a variant's runs, for the table."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return [
        f"{mean([r.kl for r, _ in runs]):.5f} ± {mean([r.kl_stderr for r, _ in runs]):.5f}",
        f"{mean([r.top1 for r, _ in runs]):.2%}",
        f"{mean([r.perplexity.value for r, _ in runs]):.3f}",
        f"{mean([s for _, s in runs]):.1f}",
    ]


if __name__ == "__main__":
    main()

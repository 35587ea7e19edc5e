"""What each ingredient of the search is worth: alone, left out of the whole, and added on top of it.

Every variant (`study_variants.py`) quantizes the same model from the same calibration tokens and is judged on
the same held-out texts, with two choices of calibration samples. Figures are the mean of both; the standard
error is that of the evaluation windows. `docs/research/accuracy.md` keeps what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from awq import QuantConfig
from awq.evaluate import Divergence, compare
from awq.pipeline import quantize
from common import Subject, add_subject_options, console, finish, held_out, subjects
from study_variants import VARIANTS, Variant


@dataclasses.dataclass(frozen=True)
class Run:
    """A variant on one choice of samples: how near it came on each text, and its seconds."""

    texts: dict[str, Divergence]
    seconds: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_subject_options(parser, samples=256)
    parser.add_argument("--variants", default=";".join(VARIANTS), help="names, separated by semicolons")
    parser.add_argument("--settings", default="w4g128", help="bits and group sizes for the bundled model")
    parser.add_argument("--used", type=int, default=128, help="samples that one quantization uses")
    parser.add_argument(
        "--text", action="append", default=[], metavar="NAME:PATH", help="a further text to judge by"
    )
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for subject, settings in subjects(options, options.settings):
        original, texts = subject.float_model(), texts_of(subject, options)
        for bits, group_size in settings:
            title = f"{subject.name} W{bits} g{group_size}"
            columns = ["variant", *(f"KL, {name}" for name in texts), "top 1", "perplexity", "seconds"]
            table = [columns, ["---", *["--:"] * (len(columns) - 1)]]
            for name in options.variants.split(";"):
                runs = [
                    measured(subject, original, texts, samples, bits, group_size, VARIANTS[name])
                    for samples in choices(subject.calibration, options.used)
                ]
                table.append([name, *cells(runs)])
                figures.setdefault(title, {})[name] = [dataclasses.asdict(run) for run in runs]
                console.print(title, name, *cells(runs), style="dim")
            console.print("", title, "", *(f"| {' | '.join(row)} |" for row in table), sep="\n")
    finish(options, figures)


def texts_of(subject: Subject, options: argparse.Namespace) -> dict[str, list[Tensor]]:
    """Evaluation tokens by the name of the text: the model's own, and those of the options."""
    tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    texts = {"own text": subject.evaluation}
    for item in options.text:
        name, _, path = item.partition(":")
        texts[name] = held_out(path, tokenizer, options.windows, subject.window)
    return texts


def choices(samples: Tensor, used: int) -> list[Tensor]:
    """Two choices of samples from everywhere, with none in common; one where there are not enough for two."""
    stride = len(samples) // used
    return [samples[start::stride][:used] for start in sorted({0, stride // 2})]


def measured(
    subject: Subject,
    original: Any,
    texts: dict[str, list[Tensor]],
    samples: Tensor,
    bits: int,
    group_size: int,
    variant: Variant,
) -> Run:
    """How near a variant comes, and the seconds it takes."""
    options = {"format": "float", "dtype": "float32", "correction": False} | variant.options
    config = QuantConfig(bits=bits, group_size=group_size, **options)
    rows = [row.tolist() for row in samples]
    with tempfile.TemporaryDirectory() as folder, variant.in_place(subject.folder, samples):
        report = quantize(
            subject.folder,
            Path(folder) / "out",
            config,
            rows,
            samples=len(rows),
            seq_len=samples.shape[1],
            verify=False,
        )
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "out", dtype=torch.float32).eval()
    found = {name: compare(model, original, ids, window=subject.window) for name, ids in texts.items()}
    return Run(found, report.seconds["total"])


def cells(runs: list[Run]) -> list[str]:
    """The means of a variant's runs, for the table; the first choice and perplexity are of its own text."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    own = [run.texts["own text"] for run in runs]
    return [
        *(
            f"{mean([run.texts[name].kl for run in runs]):.5f} ± "
            f"{mean([run.texts[name].kl_stderr for run in runs]):.5f}"
            for name in runs[0].texts
        ),
        f"{mean([each.top1 for each in own]):.2%}",
        f"{mean([each.perplexity.value for each in own]):.3f}",
        f"{mean([run.seconds for run in runs]):.1f}",
    ]


if __name__ == "__main__":
    main()

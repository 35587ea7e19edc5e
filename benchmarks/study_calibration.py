"""What calibration is worth: how many samples, of which length, and of which texts.

Every row quantizes the same model with a preset, from other tokens, and is judged on the same held-out texts.
Samples are windows of the whole text, across its documents; a row's choices of samples have none in common,
and are fewer, or none, where the text has no room for more.
`docs/research/accuracy.md` keeps what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from awq.calibration import load_calibration
from awq.config import PRESETS
from common import add_subject_options, console, finish, subjects
from study import Run, cells, measured, texts_of
from study_variants import Variant

# More samples, and longer ones, than any text has.
_ALL = 1 << 40


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to calibrate: samples of `length` tokens, equally many from each of the texts."""

    texts: tuple[str, ...]
    count: int
    length: int

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.count} x {self.length}, {' + '.join(self.texts)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_subject_options(parser, samples=1)
    parser.add_argument(
        "--shapes", default="", metavar="SAMPLESxTOKENS,…", help="calibrate on so much of the own text"
    )
    parser.add_argument(
        "--calib",
        action="append",
        default=[],
        metavar="NAME:PATH",
        help="a further text to calibrate on: alone, half and half with the own one, and all together",
    )
    parser.add_argument("--used", type=int, default=128, help="samples of --seq-len tokens for --calib")
    parser.add_argument(
        "--choices", type=int, default=2, help="of samples for each row, where there are enough"
    )
    parser.add_argument("--presets", default="balanced", help="separated by commas")
    parser.add_argument("--settings", default="w4g128", help="bits and group sizes for the bundled model")
    parser.add_argument(
        "--text", action="append", default=[], metavar="NAME:PATH", help="a further text to judge by"
    )
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for item, (subject, settings) in zip(sources(options), subjects(options, options.settings), strict=True):
        original, texts = subject.float_model(), texts_of(subject, options)
        tokenizer = AutoTokenizer.from_pretrained(subject.folder)
        tokens = {name: all_of(path, tokenizer) for name, path in item.items()}
        for bits, group_size in settings:
            for preset in options.presets.split(","):
                title = f"{subject.name} W{bits} g{group_size} {preset}"
                columns = ["samples", *(f"KL, {name}" for name in texts), "top 1", "perplexity", "seconds"]
                columns += ["own text, choice by choice"]
                table = [columns, ["---", *["--:"] * (len(columns) - 1)]]
                for row in rows(options):
                    runs: list[Run] = [
                        measured(
                            subject, original, texts, samples, bits, group_size, Variant(PRESETS[preset])
                        )
                        for samples in choices(row, tokens, options.choices)
                    ]
                    if not runs:
                        console.print(f"{title} {row.name}: the text is too short", style="dim")
                        continue
                    each = " ".join(f"{run.texts['own text'].kl:.5f}" for run in runs)
                    table.append([row.name, *cells(runs), each])
                    figures.setdefault(title, {})[row.name] = [dataclasses.asdict(run) for run in runs]
                    console.print(title, *table[-1], style="dim")
                console.print("", title, "", *(f"| {' | '.join(line)} |" for line in table), sep="\n")
    finish(options, figures)


def sources(options: argparse.Namespace) -> list[dict[str, str]]:
    """For each model, in the order of `subjects`, its calibration texts by name."""
    named = dict(item.split(":", 1) for item in options.calib)
    own = [] if options.without_bundled else ["bundled"]
    own += [item.split(":")[1] for item in options.model]
    return [{"own": path, **named} for path in own]


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """The rows of a table."""
    for shape in filter(None, options.shapes.split(",")):
        count, length = map(int, shape.split("x"))
        yield Row(("own",), count, length)
    names = [item.partition(":")[0] for item in options.calib]
    mixes = [("own",), *((name,) for name in names), *(("own", name) for name in names)] if names else []
    if len(names) > 1:
        mixes.append(("own", *names))
    for mix in mixes:
        yield Row(mix, options.used, options.seq_len)


def all_of(path: str, tokenizer: Any) -> Tensor:
    """The tokens of a text, document behind document."""
    return torch.cat(load_calibration(path, tokenizer, samples=_ALL, seq_len=_ALL).samples)


def choices(row: Row, tokens: dict[str, Tensor], wanted: int) -> list[Tensor]:
    """Choices of samples with no window in common, each from everywhere in its texts: `[samples, tokens]`."""
    bounds = [row.count * number // len(row.texts) for number in range(len(row.texts) + 1)]
    parts: list[list[Tensor]] = []
    for name, (begin, end) in zip(row.texts, pairwise(bounds), strict=True):
        ids, share = tokens[name], end - begin
        whole = ids[: len(ids) // row.length * row.length].view(-1, row.length)
        fit = min(wanted, len(whole) // share)
        places = torch.arange(share * fit) * len(whole) // (share * fit)
        parts.append([whole[places[start::fit]] for start in range(fit)])
    return [torch.cat(each) for each in zip(*parts, strict=False)]


if __name__ == "__main__":
    main()

"""Seconds to quantize: OpenAWQ beside AutoAWQ's procedure, on the same calibration tokens, by turns.

`search` is scales, ranges and codes: for AutoAWQ its grid and clip search; for OpenAWQ everything between the
statistics and the codes, with judging each block's candidates and rounding by GPTQ counted in. `total` adds
the forward passes, and for OpenAWQ opening, discovery, and writing the checkpoint as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.table import Table

from autoawq_reference import autoawq
from awq import QuantConfig
from awq.pipeline import quantize
from common import add_subject_options, console, finish, subjects


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_subject_options(parser, samples=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    figures = {}
    for subject, settings in subjects(options, "w4g128"):
        original = subject.float_model()
        samples = [row.tolist() for row in subject.calibration]
        for bits, group_size in settings:
            rounds = []
            for _ in range(options.repeats):
                _, theirs = autoawq(original, subject.calibration, bits, group_size)
                with tempfile.TemporaryDirectory() as folder:
                    report = quantize(
                        subject.folder,
                        Path(folder) / "out",
                        QuantConfig(bits=bits, group_size=group_size, format="float"),
                        samples,
                        samples=len(samples),
                        seq_len=subject.window,
                        verify=False,
                    )
                rounds.append({key: (theirs[key], report.seconds[key]) for key in ("search", "total")})
            table = Table(title=f"{subject.name} W{bits} g{group_size}: median seconds of {len(rounds)}")
            for column in ("", "AutoAWQ's procedure", "OpenAWQ", "ratio, round by round"):
                table.add_column(column, justify="right" if column else "left")
            for key in ("search", "total"):
                ratios = [entry[key][0] / entry[key][1] for entry in rounds]
                table.add_row(
                    key,
                    *(f"{statistics.median(entry[key][side] for entry in rounds):.1f}" for side in (0, 1)),
                    ", ".join(f"{ratio:.1f}" for ratio in ratios),
                )
            console.print(table)
            figures[f"{subject.name} W{bits} g{group_size}"] = rounds
    finish(options, {"rounds": figures})


if __name__ == "__main__":
    main()

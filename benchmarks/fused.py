"""Decoding with layers apart, merged, and merged with a static cache: tokens per second, by turns.

On a GPU transformers compiles the last one by itself; on a CPU it runs as it is.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from awq import QuantConfig, load_quantized
from awq.evaluate.speed import wait_for
from awq.hf.fuse import fuse
from awq.pipeline import quantize
from common import add_subject_options, console, finish, subjects
from random_experts import write_random_experts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_subject_options(parser, samples=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens generated for each")
    parser.add_argument(
        "--experts",
        type=int,
        metavar="BLOCKS",
        help="instead of these models, a random one of so many blocks with the shapes of Qwen3-30B-A3B",
    )
    parser.add_argument("--cache", type=int, nargs="*", default=[128, 512], help="lengths of static caches")
    parser.add_argument("--rounds", type=int, default=8, help="that count, after one that does not")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for title, folder in _quantized(options, Path(work)):
            models = _models(folder, options)
            for batch in options.batch:
                name = f"{title}, {options.dtype} on {options.device}, batch {batch}"
                figures[name] = _measure(models, batch, options)
                _print(name, figures[name])
    finish(options, {"rounds": figures})


def _quantized(options: argparse.Namespace, work: Path) -> Iterator[tuple[str, Path]]:
    """Names and folders of quantized models, by plain rounding."""
    if options.experts:
        write_random_experts(work / "model", options.experts)
        ids = [list(range(64))]
        quantize(work / "model", work / "out", QuantConfig(method="rtn"), ids, seq_len=64, verify=False)
        yield f"random experts, {options.experts} blocks", work / "out"
        return
    for subject, settings in subjects(options, "w4g128"):
        for bits, group_size in settings:
            out = work / f"{subject.name}-{bits}-{group_size}"
            config = QuantConfig(bits=bits, group_size=group_size, method="rtn")
            quantize(subject.folder, out, config, samples=1, seq_len=64)
            yield f"{subject.name} g{group_size}", out


def _models(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for name, length in (("apart", 0), ("merged", None), *((f"static {n}", n) for n in options.cache)):
        dtype = getattr(torch, options.dtype)
        found[name] = load_quantized(folder, dtype=dtype, device_map=options.device)
        if length != 0:
            fuse(found[name], length)
    return found


@torch.no_grad()
def _measure(models: dict[str, Any], batch: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second of each model in each round, prompts included."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.rounds + 1):
        for name, model in models.items():
            ids = torch.randint(3, model.config.vocab_size, (batch, options.prompt)).to(model.device)
            wait_for(model.device)
            started = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=options.new,
                max_new_tokens=options.new,
                do_sample=False,
                pad_token_id=0,
            )
            wait_for(model.device)
            if turn:
                found[name].append(batch * options.new / (time.perf_counter() - started))
    return found


def _print(title: str, found: dict[str, list[float]]) -> None:
    table = Table(title=title)
    for column in ("", "tokens/s (lowest-highest)", "of apart, round by round: median (quartiles)"):
        table.add_column(column, justify="right" if column else "left")
    for name, speeds in found.items():
        ratios = [speed / apart for speed, apart in zip(speeds, found["apart"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            name,
            f"{statistics.median(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f})",
            f"{middle:.2f} ({low:.2f}-{high:.2f})",
        )
    console.print(table)


if __name__ == "__main__":
    main()

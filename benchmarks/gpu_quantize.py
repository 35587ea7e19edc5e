"""Seconds per block and peak memory on a GPU: a random Llama with 8B shapes, a few blocks deep.

The checkpoint is written to a temporary folder (a few GB), or kept with --keep. `--device cpu` runs the same
code where there is no GPU, with smaller shapes named by the options.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.table import Table
from transformers import LlamaConfig

from awq import QuantConfig
from awq.pipeline import quantize
from common import console, finish
from random_llama import write_random_llama


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--wide", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", type=Path, help="make the checkpoint here, or use the one that is there")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = options.keep or Path(temporary) / "model"
        if not (model / "config.json").exists():
            started = time.perf_counter()
            write_random_llama(model, _config(options))
            console.print(f"Wrote the checkpoint in {time.perf_counter() - started:.0f} s.", style="dim")
        generator = torch.Generator().manual_seed(0)
        shape = (options.samples, options.seq_len)
        ids = torch.randint(0, options.vocabulary, shape, generator=generator).tolist()
        report = quantize(
            model,
            Path(temporary) / "out",
            QuantConfig(),
            ids,
            samples=options.samples,
            seq_len=options.seq_len,
            device=options.device,
            verify=False,
        )
    table = Table(title=f"{options.blocks} blocks of {options.hidden}/{options.wide} on {report.plan.device}")
    for column in ("block", "forward s", "search s", "total s", "chosen"):
        table.add_column(column, justify="right")
    for block in report.blocks:
        stages = (block.seconds["forward"], block.seconds["search"], block.total_seconds)
        table.add_row(block.name, *(f"{value:.2f}" for value in stages), block.outcome["chosen"])
    console.print(table)
    seconds = {name: round(value, 2) for name, value in report.seconds.items()}
    console.print(f"Seconds: {seconds}; batches of {report.plan.batch_tokens:,} tokens.")
    console.print(
        f"Peak memory {report.peak_bytes / 1e9:.2f} GB, predicted {report.plan.peak_bytes / 1e9:.2f} GB."
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    finish(options, {"gpu": gpu, "report": report.to_dict()})


def _config(options: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.wide,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
        tie_word_embeddings=False,
    )


if __name__ == "__main__":
    main()

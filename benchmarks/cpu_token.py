"""What a decoded token costs a processor: one thread's own time, for each way to load a model, by turns.

A random Llama, quantized by rounding, in bfloat16; batch 1, greedy. Times are those that the process spent,
so that other work on the machine counts only as far as it takes memory and caches.

    python benchmarks/cpu_token.py --vocabulary 32000
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import LlamaConfig

from awq import QuantConfig, load_quantized
from awq.pipeline import quantize
from common import console, finish
from random_llama import write_random_llama

WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "fuse": {"fuse": True},
    "fuse, head_bits=8": {"fuse": True, "head_bits": 8},
    "cpu-w4a8, fuse": {"kernel": "cpu-w4a8", "fuse": True},
    "cpu-w4a8, fuse, head_bits=8": {"kernel": "cpu-w4a8", "fuse": True, "head_bits": 8},
}


def main() -> None:
    """Make the model, load it in each way, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keep the model here, and use it again")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_model(options.folder or Path(temporary), options)
        models = {name: load_quantized(folder, dtype=torch.bfloat16, **WAYS[name]) for name in options.ways}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.rounds + 1):
        ids = torch.randint(1, options.vocabulary, (1, options.prompt))
        for name, model in models.items():
            spent = token_seconds(model, ids, options.decode)
            if turn:
                times[name].append(spent)
    print_table(times, options)
    finish(options, {"seconds": times})


def make_model(folder: Path, options: argparse.Namespace) -> Path:
    """The quantized model."""
    original, quantized = folder / "original", folder / "quantized"
    if not (quantized / "config.json").exists():
        config = LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=options.intermediate,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=max(1, options.hidden // 256),
            vocab_size=options.vocabulary,
        )
        write_random_llama(original, config)
        calib = torch.randint(1, options.vocabulary, (2, 64)).tolist()
        quantize(original, quantized, QuantConfig(method="rtn"), calib=calib, seq_len=64, verify=False)
    return quantized


@torch.inference_mode()
def token_seconds(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Processor time of a decoded token, the mean of `tokens` behind the first."""
    spent: list[float] = []

    class Clock:
        def put(self, _: Any) -> None:
            spent.append(time.process_time())

        def end(self) -> None:
            pass

    lengths = {"min_new_tokens": tokens + 1, "max_new_tokens": tokens + 1}
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, pad_token_id=0, do_sample=False, streamer=Clock(), **lengths)
    _, first, *_, last = spent  # the prompt comes first
    return (last - first) / tokens


def print_table(times: dict[str, list[float]], options: argparse.Namespace) -> None:
    """A line for each way to load the model."""
    table = Table(
        title=f"{options.layers} layers of {options.hidden}, vocabulary of {options.vocabulary}: "
        f"processor time of a token on one thread, {options.rounds} rounds"
    )
    for column in ("", "median ms (lowest)", "of the first, round by round: median (quartiles)"):
        table.add_column(column, justify="right" if column else "left")
    first = next(iter(times.values()))
    for name, found in times.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(found, first, strict=True)], n=4)
        table.add_row(
            name,
            f"{1e3 * statistics.median(found):.1f} ({1e3 * min(found):.1f})",
            f"{middle:.3f} ({low:.3f}-{high:.3f})",
        )
    console.print(table)


if __name__ == "__main__":
    main()

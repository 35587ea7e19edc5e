"""Norms and attention of one token on a CPU: PyTorch's and ours by turns, one thread's own time.

python benchmarks/cpu_parts.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from awq.kernels.cpu_decoding import attend, rms_norm
from common import console, finish

Ways = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8, help="heads of keys and values")
    parser.add_argument("--size", type=int, default=64, help="channels of a head")
    parser.add_argument("--lengths", type=int, nargs="+", default=[80, 576, 4096])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"us, median (lowest) of {options.rounds} rounds")
    for column in ("", "PyTorch", "ours", "PyTorch, cold caches", "ours"):
        table.add_column(column, justify="right" if column else "left")
    figures: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for name, ways in parts(options, dtype).items():
            title = f"{name}, {str(dtype).removeprefix('torch.')}"
            figures[title] = [measure(ways, options.rounds, cold) for cold in (False, True)]
            table.add_row(title, *(told(times) for pair in figures[title] for times in pair))
    console.print(table)
    finish(options, {"seconds": figures})


def parts(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Ways]:
    """What is measured, by name."""
    norm = LlamaRMSNorm(options.channels).to(dtype)
    x = torch.randn(1, 1, options.channels, dtype=dtype)
    found: dict[str, Ways] = {
        "norm": (lambda: norm(x), lambda: rms_norm(x, norm.weight, norm.variance_epsilon))
    }
    query = torch.randn(1, options.heads, 1, options.size, dtype=dtype)
    for length in options.lengths:
        found[f"attention to {length}"] = over(query, options.groups, length)
    return found


def over(query: Tensor, groups: int, length: int) -> Ways:
    """Attention to random keys and values."""
    key, value = (query.new_empty(1, groups, length, query.shape[-1]).normal_() for _ in range(2))
    scale = query.shape[-1] ** -0.5
    return (
        lambda: (
            F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2).contiguous()
        ),
        lambda: attend(query, key, value, None, scale),
    )


@torch.inference_mode()
def measure(ways: Ways, rounds: int, cold: bool) -> list[list[float]]:
    """Seconds of each way in each round, after two that do not count."""
    other = torch.zeros(16 << 20)
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 2):
        for found, way in zip(times, ways, strict=True):
            if cold:
                other.add_(1)
            else:
                way()
            started = time.thread_time()
            way()
            if turn > 1:
                found.append(time.thread_time() - started)
    return times


def told(times: list[float]) -> str:
    """Median and lowest."""
    return f"{1e6 * statistics.median(times):.0f} ({1e6 * min(times):.0f})"


if __name__ == "__main__":
    main()

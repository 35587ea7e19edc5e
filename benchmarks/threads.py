"""How long PyTorch's idle threads spin before they sleep, and what that costs: decoding on two threads.

Products of 4-bit layers with PyTorch's own operations between them, as in decoding, in a process for each way
to wait, alone and beside as many processes that want the cores too. GNU's OpenMP only (Linux).

    python benchmarks/threads.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.table import Table

from awq.nn import QuantLinear
from awq.weight import QuantizedWeight
from common import console

WAYS: dict[str, dict[str, str]] = {
    "as PyTorch does": {},
    "GOMP_SPINCOUNT=50000": {"GOMP_SPINCOUNT": "50000"},
    "GOMP_SPINCOUNT=10000 (the command)": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
BLOCKS, PASSES, HIDDEN, WIDE = 5, 4, 2048, 5632


def main() -> None:
    """Each way in turn, in a fresh process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3, help="to decode in each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(1000 * token_seconds(options.seconds))
        return
    table = Table(title=f"ms of a token on {options.threads} threads: median of {options.rounds} processes")
    for column in ("idle threads", "alone", "beside busy processes"):
        table.add_column(column, justify="right")
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(options.rounds):
        for busy in (False, True):
            busy_one = [sys.executable, "-c", "while True: pass"]
            neighbours = [subprocess.Popen(busy_one) for _ in range(options.threads if busy else 0)]
            try:
                for way in WAYS:
                    found.setdefault((way, busy), []).append(run(way, options))
            finally:
                for neighbour in neighbours:
                    neighbour.kill()
    for way in WAYS:
        table.add_row(way, *(told(found[way, busy]) for busy in (False, True)))
    console.print(table)


def told(times: list[float]) -> str:
    """Median and spread."""
    return f"{statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f})"


def run(way: str, options: argparse.Namespace) -> float:
    """Milliseconds of a token in a process of its own."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_WAIT", "GOMP_SPIN"))}
    command = [sys.executable, str(Path(__file__)), "--worker", "--seconds", str(options.seconds)]
    environment = plain | WAYS[way] | {"OMP_NUM_THREADS": str(options.threads)}
    return float(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


@torch.inference_mode()
def token_seconds(seconds: float) -> float:
    """Median time of the products of a token."""
    shapes = [(HIDDEN, HIDDEN), (2 * WIDE, HIDDEN), (HIDDEN, WIDE)]
    blocks = [[layer(*shape) for shape in shapes] for _ in range(BLOCKS)]
    norm = torch.nn.RMSNorm(HIDDEN).bfloat16()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        x, started = torch.ones(1, 1, HIDDEN, dtype=torch.bfloat16), time.perf_counter()
        for attention, gate_up, down in PASSES * blocks:
            x = attention(norm(x)) + x
            gate, up = gate_up(norm(x)).chunk(2, -1)
            x = down(torch.nn.functional.silu(gate) * up) + x
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def layer(rows: int, columns: int) -> QuantLinear:
    """A random layer, prepared."""
    groups = (rows, columns // 128)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    zeros = torch.randint(0, 16, groups, dtype=torch.uint8)
    made = QuantLinear.from_weight(QuantizedWeight(codes, torch.rand(groups).half() * 0.02, zeros))
    made.prepare(torch.bfloat16)
    return made


if __name__ == "__main__":
    main()

"""Timing on a GPU: replays of a captured graph, over enough copies of the data that no cache helps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

_CALLS = 24
# Seconds.
_WARM_UP = 0.01


def graph_microseconds(calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
    """Median microseconds of one call: all are captured, again and again, in one graph, which is replayed.

    A graph of a few calls would show what it costs to start one.
    """
    calls = list(calls) * -(-_CALLS // len(calls))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    # The card takes its time to raise its clocks. Much more of this would bring it to its power limit.
    started = time.perf_counter()
    while time.perf_counter() - started < _WARM_UP:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def copies_that_miss_the_cache(bytes_of_one: int) -> int:
    """How many copies to go round, so that each is out of the cache when its turn comes."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, -(-4 * cache // bytes_of_one)))


@triton.jit
def _read(source_ptr, target_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Read, and do next to nothing with it."""
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        at = (tl.program_id(0) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source_ptr + at)
    tl.store(target_ptr + tl.program_id(0), tl.sum(total, 0))


def device_facts() -> dict[str, float | str]:
    """What the card reaches: TB/s of a 512 MiB copy, of reading 512 MiB, and of reading 30 MiB in one launch,
    which is what a layer of 14336 x 4096 weights takes; TFLOP/s in bfloat16."""
    source = torch.randn(2**27, device="cuda")
    target = torch.empty_like(source)
    copy = graph_microseconds([lambda: target.copy_(source)] * 4)
    read = graph_microseconds([lambda: source.sum()] * 4)
    parts = source[: 8 * 7864320].split(7864320)
    sums = torch.empty(960, device="cuda")
    small = graph_microseconds([lambda part=part: _read[(960,)](part, sums, 2, 4096) for part in parts])
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    matrix = graph_microseconds([lambda: square @ square] * 4)
    return {
        "card": torch.cuda.get_device_name(),
        "copy TB/s": 2 * source.nbytes / copy / 1e6,
        "read TB/s": source.nbytes / read / 1e6,
        "read 30 MiB TB/s": parts[0].nbytes / small / 1e6,
        "bfloat16 TFLOP/s": 2 * 8192**3 / matrix / 1e6,
    }

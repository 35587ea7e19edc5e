"""Generation speed of several models, measured by turns: machines are noisy, and drift together."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Speed:
    """Tokens per second of greedy generation: median, smallest and largest of the repeats."""

    median: float
    low: float
    high: float


@functools.cache
def copy_bandwidth(device: str | torch.device = "cpu", megabytes: int = 256, repeats: int = 7) -> float:
    """Bytes per second that copying a large tensor reaches, reads and writes counted: a practical limit.

    Args:
        device: where.
        megabytes: size of the tensor; larger than the caches.
        repeats: the fastest of these counts, after one that touches the memory.
    """
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(repeats):
        wait_for(source.device)
        started = time.perf_counter()
        target.copy_(source)
        wait_for(source.device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.numel() / min(seconds)


def wait_for(device: torch.device) -> None:
    """Until what was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def generation_speeds(
    models: Mapping[str, Any], ids: Tensor, new_tokens: int = 64, repeats: int = 5
) -> dict[str, Speed]:
    """Time greedy generation from a prompt, each model once per round, after one uncounted round.

    Args:
        models: by name.
        ids: int64 `[1, tokens]`, the prompt.
        new_tokens: generated exactly this many.
        repeats: rounds.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            started = time.perf_counter()
            model.generate(
                ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
            )
            wait_for(model.device)
            if turn:
                found[name].append(new_tokens / (time.perf_counter() - started))
    return {name: Speed(statistics.median(times), min(times), max(times)) for name, times in found.items()}

"""Prefill and decode of several models, by turns: tokens per second, time to the first token, memory.

Each measurement is one call of `generate` on random token ids, whose tokens are timed as they come: what is
measured is what a user of `generate` gets, sampling and caches included.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq.evaluate.speed import Speed, wait_for


@dataclasses.dataclass(frozen=True)
class Throughput:
    """One model at one size.

    Args:
        batch, prefill, decode: sequences, tokens of each prompt, tokens generated for each.
        first_token: seconds until the first token.
        prefill_speed, decode_speed: tokens per second, all sequences together.
        weights: bytes that the model's weights take, in the arrangement of their kernels.
        peak: bytes at the most while it ran, weights included; None where that cannot be told.
        read: bytes of weights that one decoding step reads; None where not all of them are (experts).
        read_speed: bytes of weights per second while decoding, from the median.
    """

    batch: int
    prefill: int
    decode: int
    first_token: Speed
    prefill_speed: Speed
    decode_speed: Speed
    weights: int
    peak: int | None
    read: int | None
    read_speed: float | None


class Arrivals:
    """A streamer for `generate` that notes when each token of the batch came."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """The prompt first, then one token for each sequence at a time."""
        wait_for(self._device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


@torch.no_grad()
def throughput(
    models: Mapping[str, Any], batch: int, prefill: int, decode: int, repeats: int = 3
) -> dict[str, Throughput]:
    """Measure models by turns, after one uncounted round.

    Args:
        models: by name; in eval mode, each on its device.
        batch: sequences at once.
        prefill: tokens of each prompt.
        decode: tokens generated after the first, for each sequence; at least 1.
        repeats: rounds that count.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks: dict[str, list[int]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            grown = _Growth(model.device)
            times = _one(model, batch, prefill, decode, seed=turn)
            peak = grown.bytes()
            if peak is not None:
                peaks[name].append(peak)
            if turn:
                found[name].append(times)
    return {
        name: _summary(models[name], (batch, prefill, decode), times, max(peaks[name], default=None))
        for name, times in found.items()
    }


def _one(model: Any, batch: int, prefill: int, decode: int, seed: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (batch, prefill), generator=generator).to(model.device)
    arrivals = Arrivals(model.device)
    wait_for(model.device)
    started = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=decode + 1,
        max_new_tokens=decode + 1,
        do_sample=False,
        pad_token_id=0,
        streamer=arrivals,
    )
    _, first, *_, last = arrivals.times
    return first - started, last - first


def _summary(
    model: Any, sizes: tuple[int, int, int], times: Sequence[tuple[float, float]], grown: int | None
) -> Throughput:
    batch, prefill, decode = sizes
    weights, read = held_bytes(model), read_bytes(model)
    decoding = _speed([batch * decode / rest for _, rest in times])
    return Throughput(
        *sizes,
        first_token=_speed([first for first, _ in times]),
        prefill_speed=_speed([batch * prefill / first for first, _ in times]),
        decode_speed=decoding,
        weights=weights,
        peak=None if grown is None else weights + grown,
        read=read,
        read_speed=None if read is None else read * decoding.median / batch,
    )


def _speed(values: Sequence[float]) -> Speed:
    return Speed(statistics.median(values), min(values), max(values))


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors; of quantized layers, those of their kernel's arrangement."""
    return _bytes(_held(model, embeddings=True))


def read_bytes(model: nn.Module) -> int | None:
    """Bytes that a decoding step reads: all but embeddings, of which it looks up single rows.

    None when the model has experts, of which only some are used.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    if getattr(text, "num_experts_per_tok", None):
        return None
    return _bytes(_held(model, embeddings=False))


def _held(model: nn.Module, embeddings: bool) -> list[Tensor]:
    tensors: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Embedding) and not embeddings:
            continue
        held = getattr(module, "held_tensors", None)
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        tensors += held() if held is not None else own
    return tensors


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of distinct tensors: tied ones count once."""
    return sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors}.values())


class _Growth:
    """How much memory is taken at the most from now on, beyond what is taken now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
            return
        try:
            # Linux then counts the peak anew.
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident("VmRSS")
        except OSError:
            self._before = None

    def bytes(self) -> int | None:
        """None where the system does not tell."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _resident("VmHWM") - self._before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024

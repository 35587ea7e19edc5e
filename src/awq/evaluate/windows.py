"""How a text is cut for evaluation, and estimates over the pieces."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from awq.errors import CalibrationError, ConfigError


@dataclasses.dataclass(frozen=True)
class Window:
    """A piece of text that is run through a model by itself.

    Args:
        ids: int64 `[tokens]`.
        first: the predictions of tokens from this place on are scored (the ones before were scored already,
            or, for 0, nothing can predict the first token, and scoring starts at 1).
    """

    ids: Tensor
    first: int


def windows(
    ids: Tensor | Sequence[Tensor], window: int, stride: int | None = None, max_tokens: int | None = None
) -> list[Window]:
    """Cut a text in windows.

    Args:
        ids: int64 `[tokens]` for a running text, whose rest shorter than a window is left out; or a list of
            them for documents, each cut by itself, whose shorter rests are windows too.
        window: tokens of a window.
        stride: tokens from one window's start to the next one's; `window` by default, so that windows do not
            overlap. With overlap only the tokens not scored before are scored.
        max_tokens: use this many tokens of the text at most.

    Raises:
        ConfigError: sizes have no meaning.
        CalibrationError: the text is shorter than one window, or no document has two tokens.
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ConfigError(f"window={window} must be at least 2, and stride={stride} between 1 and it")
    if isinstance(ids, Tensor):
        ids = ids if max_tokens is None else ids[: max(0, max_tokens)]
        if len(ids) < window:
            raise CalibrationError(
                f"the text has {len(ids)} tokens, fewer than one window of {window}; use a smaller window or "
                "a longer text"
            )
        begins = range(0, len(ids) - window + 1, stride)
        return [Window(ids[b : b + window], max(1, window - stride if b else 1)) for b in begins]
    found = [part for document in ids for part in _windows_of_document(document, window, stride)]
    if max_tokens is not None:
        found = list(_up_to(found, max_tokens))
    if not found:
        raise CalibrationError("no document has two tokens or more: there is nothing to predict")
    return found


def _windows_of_document(ids: Tensor, window: int, stride: int) -> Iterator[Window]:
    for begin in range(0, max(1, len(ids) - window + stride), stride):
        first = window - stride if begin else 1
        part = ids[begin : begin + window]
        if len(part) > max(1, first):
            yield Window(part, max(1, first))


def _up_to(found: Sequence[Window], tokens: int) -> Iterator[Window]:
    for item in found:
        tokens -= len(item.ids)
        if tokens < 0:
            return
        yield item


def batches(items: Sequence[Window], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`(ids [batch, window], scored [batch, window - 1] bool)`; scored[:, i] is for predicting i + 1.

    Shorter windows are padded on the right, where a causal model's real tokens never see it.
    """
    for begin in range(0, len(items), size):
        part = items[begin : begin + size]
        ids = torch.nn.utils.rnn.pad_sequence([item.ids for item in part], batch_first=True)
        place = torch.arange(1, ids.shape[1])
        yield ids, torch.stack([(place >= item.first) & (place < len(item.ids)) for item in part])


@dataclasses.dataclass
class Mean:
    """A mean over tokens with a standard error over windows: tokens of one window are not independent."""

    sums: list[Tensor] = dataclasses.field(default_factory=list)
    counts: list[Tensor] = dataclasses.field(default_factory=list)

    def add(self, values: Tensor, scored: Tensor) -> None:
        """Count `values` `[windows, n]` where `scored` is set."""
        self.sums.append((values * scored).double().sum(1).cpu())
        self.counts.append(scored.sum(1).double().cpu())

    def result(self) -> tuple[float, float]:
        """Mean, and its standard error (NaN for a single window)."""
        sums, counts = torch.cat(self.sums), torch.cat(self.counts)
        mean = float(sums.sum() / counts.sum())
        number = len(sums)
        if number < 2:
            return mean, math.nan
        spread = float((sums - mean * counts).square().sum())
        return mean, math.sqrt(spread * number / (number - 1)) / float(counts.sum())

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return int(torch.cat(self.counts).sum())

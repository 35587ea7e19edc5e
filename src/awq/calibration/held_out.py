"""Text on which a quantized model is compared with its original: what calibration has not seen, if possible.

Windows are short and many: tokens of one window depend on one another, so windows, not tokens, decide how
sure the figures are. Each excerpt is tokenized by itself, and so begins as the model expects a text to begin.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from awq.calibration import sources
from awq.calibration.samples import CalibrationSet
from awq.errors import AwqError

# Windows, and tokens of each at most.
WINDOWS, WINDOW = 16, 256
# Spare samples with fewer tokens in all say too little.
_FEWEST_TOKENS = 512
# Characters that surely hold a token, in any language and vocabulary that matters here.
_CHARACTERS_A_TOKEN = 8


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Text to judge by.

    Args:
        ids: int64 `[tokens]` for each window, 2 to `window` tokens.
        source: what it is, for a person.
        window: tokens of a window at most.
    """

    ids: tuple[Tensor, ...]
    source: str
    window: int


def held_out(
    source: Any, calibration: CalibrationSet, tokenizer: Any, vocabulary: int, context: int | None = None
) -> HeldOut | None:
    """The best text at hand, or None when there is none.

    For the bundled calibration text that is the bundled evaluation text (other books). For a text of the
    caller's, the spare samples of it; then the bundled text; and where the model has no tokenizer for it, the
    calibration samples themselves, which is told.

    Args:
        source: what `load_calibration` was given.
        calibration: what it made of it.
        tokenizer: the model's.
        vocabulary: rows of the model's embeddings.
        context: most tokens that the model takes.
    """
    window = min(WINDOW, context or WINDOW)
    spare = _windows(calibration.spare, window)
    if source != "bundled" and sum(map(len, spare)) >= _FEWEST_TOKENS:
        return HeldOut(spare, "the part of the calibration text that was not used", window)
    bundled = _windows(_excerpts(tokenizer, window), window)
    if bundled and all(int(ids.max()) < vocabulary for ids in bundled):
        return HeldOut(bundled, "excerpts of the bundled held-out books", window)
    texts = tuple(sample for sample in calibration.samples if isinstance(sample, Tensor))
    own = _windows(spare + texts, window)
    return (
        HeldOut(own, "the calibration samples themselves (no other text was at hand)", window)
        if own
        else None
    )


def _windows(samples: tuple[Tensor, ...], window: int) -> tuple[Tensor, ...]:
    """The beginnings of some samples with two tokens or more, the long ones evenly from all."""
    useful = [ids[:window] for ids in samples if len(ids) > 1]
    count = min(WINDOWS, len(useful))
    return tuple(useful[i * len(useful) // count] for i in range(count))


def _excerpts(tokenizer: Any, window: int) -> tuple[Tensor, ...]:
    """Excerpts spread evenly over the bundled evaluation text; none if there is no tokenizer for it."""
    text = sources.bundled_text("evaluation")
    pieces = []
    for number in range(WINDOWS):
        begin = text.find(" ", number * len(text) // WINDOWS) + 1
        pieces.append(text[begin : begin + window * _CHARACTERS_A_TOKEN])
    try:
        return tuple(torch.tensor(tokenizer(piece, verbose=False)["input_ids"]) for piece in pieces)
    except AwqError:
        return ()

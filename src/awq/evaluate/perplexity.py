"""Perplexity, with its definition beside it: figures without one do not compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awq.errors import EvaluationError
from awq.evaluate.windows import Mean, batches, windows


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood of the scored tokens).

    Args:
        value: the perplexity; `stderr` its standard error (first order).
        nll: nats per token; `nll_stderr` its standard error over windows.
        windows, window, stride: how the text was cut.
        tokens: tokens scored.
    """

    value: float
    stderr: float
    nll: float
    nll_stderr: float
    windows: int
    window: int
    stride: int
    tokens: int

    def definition(self) -> str:
        """One sentence."""
        return (
            f"exp(mean negative log-likelihood) over {self.windows} windows of up to {self.window} tokens, "
            f"stride {self.stride}, {self.tokens:,} tokens scored"
        )

    @classmethod
    def of(cls, mean: Mean, window: int, stride: int) -> Perplexity:
        """From the negative log-likelihoods of all windows."""
        nll, stderr = mean.result()
        try:
            value = math.exp(nll)
        except OverflowError:
            value = math.inf
        return cls(
            value,
            value * stderr,
            nll,
            stderr,
            sum(len(counts) for counts in mean.counts),
            window,
            stride,
            mean.tokens,
        )


@torch.no_grad()
def perplexity(
    model: Any,
    ids: Tensor | Sequence[Tensor],
    *,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """A causal model's perplexity on a text.

    Args:
        model: a transformers causal language model.
        ids: int64 `[tokens]`, or a list of them for separate documents.
        window, stride, max_tokens: see `awq.evaluate.windows`.
        batch_size: windows run at once.

    Raises:
        EvaluationError: the model gives NaN or infinity.
    """
    mean = Mean()
    for part, scored in batches(windows(ids, window, stride, max_tokens), batch_size):
        logs = log_probabilities(model, part)
        mean.add(-picked(logs, part), scored.to(logs.device))
    return Perplexity.of(mean, window, window if stride is None else stride)


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of each next token, float32 `[batch, tokens - 1, vocabulary]`.

    Raises:
        EvaluationError: the model gives NaN or infinity.
    """
    logits = model(ids.to(model.device), use_cache=False).logits[:, :-1].float()
    if not bool(torch.isfinite(logits).all()):
        raise EvaluationError(
            f"{type(model).__name__} gives NaN or infinite logits on this text; load it with another dtype, "
            "and look at the quantization report for the block where errors start"
        )
    return torch.log_softmax(logits, dim=-1)


def picked(logs: Tensor, ids: Tensor) -> Tensor:
    """The log-probability of each token that really followed, `[batch, tokens - 1]`."""
    return logs.gather(-1, ids[:, 1:, None].to(logs.device)).squeeze(-1)

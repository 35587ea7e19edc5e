"""How far a model's predictions are from another model's: KL divergence and agreement of the first choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awq.errors import EvaluationError
from awq.evaluate.perplexity import Perplexity, log_probabilities, picked
from awq.evaluate.windows import Mean, batches, windows


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A model beside a reference, over the same tokens; every figure with its standard error over windows.

    Args:
        kl: mean KL(reference ‖ model) of the next-token distributions, in nats.
        top1: share of tokens for which both rank the same token first.
        perplexity, reference_perplexity: of the model and of the reference.
        tokens: tokens scored.
    """

    kl: float
    kl_stderr: float
    top1: float
    top1_stderr: float
    perplexity: Perplexity
    reference_perplexity: Perplexity
    tokens: int


@torch.no_grad()
def compare(
    model: Any,
    reference: Any,
    ids: Tensor | Sequence[Tensor],
    *,
    window: int = 512,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> Divergence:
    """Run both models over a text, window by window, and compare what they predict.

    Args: as `awq.evaluate.perplexity`, and `reference`, the model to compare with.

    Raises:
        EvaluationError: a model gives NaN or infinity, or the vocabularies differ.
    """
    kl, top1, own, other = Mean(), Mean(), Mean(), Mean()
    for part, scored in batches(windows(ids, window, stride, max_tokens), batch_size):
        target = log_probabilities(reference, part)
        logs = log_probabilities(model, part).to(target.device)
        if logs.shape != target.shape:
            raise EvaluationError(
                f"the vocabularies differ ({logs.shape[-1]} tokens, {target.shape[-1]} in the reference): "
                "the models cannot be compared"
            )
        scored = scored.to(target.device)
        # Each term p log(p/q) - p + q is non-negative, so rounding cannot make the sum negative.
        p, q = target.exp(), logs.exp()
        kl.add((p * (target - logs) - p + q).sum(-1).clamp_min(0), scored)
        top1.add((target.argmax(-1) == logs.argmax(-1)).float(), scored)
        own.add(-picked(logs, part), scored)
        other.add(-picked(target, part), scored)
    stride = window if stride is None else stride
    return Divergence(
        *kl.result(),
        *top1.result(),
        Perplexity.of(own, window, stride),
        Perplexity.of(other, window, stride),
        kl.tokens,
    )

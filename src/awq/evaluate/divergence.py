"""How far a model's predictions are from another model's: KL divergence and agreement of the first choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awq.errors import EvaluationError
from awq.evaluate.perplexity import Perplexity, log_probabilities
from awq.evaluate.windows import Mean, batches, windows


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A model beside a reference, over the same tokens; every figure with its standard error over windows.

    Args:
        kl: mean KL(reference ‖ model) of the next-token distributions, in nats.
        top1: share of tokens for which both rank the same token first.
        perplexity, reference_perplexity: of the model and of the reference.
        tokens: tokens scored.
        rise: how much the mean negative log-likelihood is above the reference's, in nats; its standard error
            is that of the difference, token by token.
    """

    kl: float
    kl_stderr: float
    top1: float
    top1_stderr: float
    perplexity: Perplexity
    reference_perplexity: Perplexity
    tokens: int
    rise: float
    rise_stderr: float


@dataclasses.dataclass
class Tally:
    """Sums over windows, of which a `Divergence` is made."""

    kl: Mean = dataclasses.field(default_factory=Mean)
    top1: Mean = dataclasses.field(default_factory=Mean)
    own: Mean = dataclasses.field(default_factory=Mean)
    reference: Mean = dataclasses.field(default_factory=Mean)
    rise: Mean = dataclasses.field(default_factory=Mean)

    def add(self, values: Tensor, scored: Tensor) -> None:
        """Count what `differences` returned, `[4, windows, n]`, where `scored` is set."""
        kl, same, own, reference = values
        self.kl.add(kl, scored)
        self.top1.add(same, scored)
        self.own.add(own, scored)
        self.reference.add(reference, scored)
        self.rise.add(own - reference, scored)

    def result(self, window: int, stride: int) -> Divergence:
        """The figures; `window` and `stride` tell how the text was cut."""
        return Divergence(
            *self.kl.result(),
            *self.top1.result(),
            Perplexity.of(self.own, window, stride),
            Perplexity.of(self.reference, window, stride),
            self.kl.tokens,
            *self.rise.result(),
        )


def differences(logs: Tensor, target: Tensor, following: Tensor) -> Tensor:
    """What differs for each token, float32 `[4, windows, n]`.

    Args:
        logs, target: log-probabilities of a model and of the reference, `[windows, n, vocabulary]`.
        following: the tokens that really followed, int64 `[windows, n]`.

    Returns:
        KL divergence, whether both rank the same token first, and the negative log-likelihoods of both.
    """
    # Each term p log(p/q) - p + q is non-negative, so rounding cannot make the sum negative.
    p, q = target.exp(), logs.exp()
    kl = (p * (target - logs) - p + q).sum(-1).clamp_min(0)
    same = (target.argmax(-1) == logs.argmax(-1)).float()
    picked = [-each.gather(-1, following.unsqueeze(-1)).squeeze(-1) for each in (logs, target)]
    return torch.stack([kl, same, *picked])


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
    tally = Tally()
    for part, scored in batches(windows(ids, window, stride, max_tokens), batch_size):
        target = log_probabilities(reference, part)
        logs = log_probabilities(model, part).to(target.device)
        if logs.shape != target.shape:
            raise EvaluationError(
                f"the vocabularies differ ({logs.shape[-1]} tokens, {target.shape[-1]} in the reference): "
                "the models cannot be compared"
            )
        following = part[:, 1:].to(target.device)
        tally.add(differences(logs, target, following), scored.to(target.device))
    return tally.result(window, window if stride is None else stride)

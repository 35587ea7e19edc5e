"""Weights for the inputs that quantized layers before really give.

Behind layers that are quantized a layer no longer sees x but x̂, and what its output is added to is off as
well. Part of what is missing is linear in x̂, and so a change of the weight can supply it: the one that fits
E[e x̂ᵀ], e being what is missing, is E[e x̂ᵀ] E[x̂ x̂ᵀ]⁻¹. The change comes before rounding and costs the
checkpoint nothing.

How far the fit can be believed depends on the tokens for each channel: with few it learns the tokens at hand
by heart. So E[x̂ x̂ᵀ] is damped by channels / tokens of its mean diagonal, and the change is made smaller by
tokens / (tokens + 4 channels). docs/research/accuracy.md has the figures that these were chosen by.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# Channels a token at which half of the change is believed: see above.
_BELIEVED = 4


@dataclasses.dataclass(frozen=True)
class Drift:
    """What is missing behind a layer, as far as its inputs tell.

    Args:
        cross: float32 E[e x̂ᵀ]: `[in, in]` if e is what is missing in the layer's inputs, `[out, in]` if it is
            what is missing in its outputs.
        gram: float32 `[in, in]`, E[x̂ x̂ᵀ].
        tokens: rows counted.
        of_inputs: whether e are inputs.
    """

    cross: Tensor
    gram: Tensor
    tokens: int
    of_inputs: bool

    def corrected(self, weight: Tensor) -> Tensor:
        """`weight` float32 `[out, in]` with the change that supplies what is missing.

        With fewer tokens than channels it is left as it is.
        """
        channels = weight.shape[1]
        if self.tokens < channels:
            return weight
        damping = self.gram.diagonal().mean() * channels / self.tokens
        gram = self.gram + damping * torch.eye(channels, device=weight.device)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            return weight
        missing = weight @ self.cross if self.of_inputs else self.cross
        change = torch.cholesky_solve(missing.t(), factor).t()
        return weight + change * (self.tokens / (self.tokens + _BELIEVED * channels))


class DriftAccumulator:
    """Adds up what is missing, batch by batch.

    Args:
        missing: features of e.
        channels: input features of the layer.
        of_inputs: see `Drift`.
        device: where the sums are held.
    """

    def __init__(
        self, missing: int, channels: int, of_inputs: bool, device: torch.device | str = "cpu"
    ) -> None:
        self._cross = torch.zeros(missing, channels, device=device)
        self._gram = torch.zeros(channels, channels, device=device)
        self._of_inputs = of_inputs
        self._tokens = 0

    def add(self, missing: Tensor, inputs: Tensor) -> None:
        """Count the finite rows of `missing` `[tokens, missing]` and `inputs` `[tokens, channels]`."""
        if not bool(torch.isfinite(missing.sum() + inputs.sum())):
            finite = torch.isfinite(missing).all(dim=1) & torch.isfinite(inputs).all(dim=1)
            missing, inputs = missing[finite], inputs[finite]
        self._cross.addmm_(missing.t(), inputs)
        self._gram.addmm_(inputs.t(), inputs)
        self._tokens += inputs.shape[0]

    def finish(self) -> Drift:
        """The means so far; the sums are used up."""
        count = max(self._tokens, 1)
        return Drift(self._cross.div_(count), self._gram.div_(count), self._tokens, self._of_inputs)

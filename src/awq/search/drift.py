"""Weights that make up for what is wrong in the sum that their output is added to.

Behind layers that are quantized a layer sees x̂ in the place of x, and what its output is added to is off as
well. Part of what is missing in the sum is linear in x̂, and so a change of the weight can supply it: the one
that fits is E[e x̂ᵀ] E[x̂ x̂ᵀ]⁻¹, e being what is missing. The change comes before rounding and costs the
checkpoint nothing.

How far the fit can be believed depends on the tokens for each channel: with few it learns the tokens at hand
by heart. So E[x̂ x̂ᵀ] is damped by channels / tokens of its mean diagonal, and the change is made smaller by
tokens / (tokens + 4 channels). docs/research/accuracy.md has the figures that these were chosen by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq.search.gram import GramAccumulator

# Channels a token at which half of the change is believed: see above.
_BELIEVED = 4


class DriftAccumulator:
    """Adds up what is missing behind a layer, batch by batch.

    Args:
        out_features, in_features: of the layer.
        device: where the sums are held.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device | str = "cpu") -> None:
        self._cross = torch.zeros(out_features, in_features, device=device)
        self._gram = GramAccumulator(in_features, device=device)

    def add(self, missing: Tensor, inputs: Tensor) -> None:
        """Count the finite rows of `missing` float32 `[tokens, out]` and `inputs` float32 `[tokens, in]`."""
        if not bool(torch.isfinite(missing.sum() + inputs.sum())):
            finite = torch.isfinite(missing).all(dim=1) & torch.isfinite(inputs).all(dim=1)
            missing, inputs = missing[finite], inputs[finite]
        self._cross.addmm_(missing.t(), inputs)
        self._gram.add(inputs)

    def correction(self) -> Tensor:
        """The change of the layer's weight, float32 `[out, in]`; none where tokens are fewer than channels.

        The sums are used up.
        """
        seen = self._gram.finish()
        tokens, channels, gram = seen.tokens, seen.in_features, seen.gram[0]
        if tokens < channels:
            return torch.zeros_like(self._cross)
        diagonal = gram.diagonal()
        diagonal += diagonal.mean() * channels / tokens
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            return torch.zeros_like(self._cross)
        change = torch.cholesky_solve(self._cross.t() / tokens, factor).t()
        return change * (tokens / (tokens + _BELIEVED * channels))

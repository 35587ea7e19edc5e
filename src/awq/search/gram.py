"""What a linear layer saw, in one matrix: G = XᵀX / n.

With G the mean squared output error of any changed weight is exact, tr(ΔW G ΔWᵀ), and costs one product of
size out x in x in, however many tokens were seen. Tokens of any raggedness add up.

A full G of a very wide layer would not fit, so G is held as `[parts, width, width]`: the diagonal parts of
equal width. One part is the exact matrix; more parts leave out the correlations between them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# Strips of rows of G that are added up together: how high at least, and how many at most. Wide enough for the
# caches, and nearly half of the work is saved.
_STRIP, _STRIPS = 256, 8


@dataclasses.dataclass(frozen=True)
class InputStats:
    """Statistics of the inputs of one or more linear layers.

    Args:
        gram: float32 `[parts, width, width]`, with parts * width = in_features.
        mean_abs: float32 `[in_features]`, mean |x| of each channel.
        tokens: rows counted.
        dropped: rows left out because they held NaN or infinity.
    """

    gram: Tensor
    mean_abs: Tensor
    tokens: int
    dropped: int = 0

    @property
    def in_features(self) -> int:
        """Channels."""
        return self.mean_abs.shape[0]

    @property
    def exact(self) -> bool:
        """Whether every correlation between channels is held."""
        return self.gram.shape[0] == 1

    def divided(self, scale: Tensor) -> InputStats:
        """The statistics of X / scale: what the layer sees once `scale` is folded into its producer.

        Args:
            scale: float32 `[in_features]`, positive.
        """
        parts = scale.view(self.gram.shape[0], -1)
        gram = self.gram / (parts.unsqueeze(2) * parts.unsqueeze(1))
        return dataclasses.replace(self, gram=gram, mean_abs=self.mean_abs / scale)

    def diagonal_blocks(self, size: int) -> Tensor:
        """The diagonal blocks of G of `size` channels, `[in_features / size, size, size]`."""
        parts, width, _ = self.gram.shape
        tiles = self.gram.view(parts, width // size, size, width // size, size)
        return tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, size, size)


class GramAccumulator:
    """Adds up statistics batch by batch.

    Args:
        channels: input features of the layer.
        width: channels of one part of G; must divide `channels`. `channels` itself keeps G exact.
        device: where the sums are held.
    """

    def __init__(self, channels: int, width: int | None = None, device: torch.device | str = "cpu") -> None:
        width = width or channels
        self._gram = torch.zeros(channels // width, width, width, device=device)
        self._abs = torch.zeros(channels, device=device)
        self.tokens = 0
        self.dropped = 0

    def add(self, inputs: Tensor, keep: Tensor | None = None) -> None:
        """Count the rows of `inputs` `[..., channels]`, or those where the bool `keep` `[...]` is set."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if keep is not None:
            rows = rows[keep.reshape(-1)]
        rows = rows.float()
        sums = rows.abs().sum(dim=0)
        # One look at the sums is enough for nearly every batch.
        if not bool(torch.isfinite(sums).all()):
            finite = torch.isfinite(rows).all(dim=1)
            self.dropped += int((~finite).sum())
            rows = rows[finite]
            sums = rows.abs().sum(dim=0)
        for gram, columns in zip(self._gram, rows.split(self._gram.shape[1], dim=1), strict=True):
            for strip in self._strips():
                gram[strip, : strip.stop].addmm_(columns[:, strip].t(), columns[:, : strip.stop])
        self._abs += sums
        self.tokens += rows.shape[0]

    def _strips(self) -> list[slice]:
        """Rows of a part of G. What lies above the diagonal's blocks is not added up: G is symmetric."""
        width = self._gram.shape[1]
        size = max(_STRIP, -(-width // _STRIPS))
        return [slice(begin, min(begin + size, width)) for begin in range(0, width, size)]

    def finish(self) -> InputStats:
        """The statistics so far, all zero when no row was counted; the sums are used up."""
        count = max(self.tokens, 1)
        for strip in self._strips():
            before = slice(0, strip.start)
            self._gram[:, before, strip] = self._gram[:, strip, before].transpose(1, 2)
        return InputStats(self._gram.div_(count), self._abs.div_(count), self.tokens, self.dropped)


def output_error(delta: Tensor, stats: InputStats) -> Tensor:
    """Mean squared output of a weight, per row: diag(ΔW G ΔWᵀ), float32 `[out_features]`.

    Args:
        delta: `[out_features, in_features]`, a weight or the change of one.
    """
    parts, width, _ = stats.gram.shape
    split = delta.view(delta.shape[0], parts, width).transpose(0, 1)
    return (torch.bmm(split, stats.gram) * split).sum(dim=(0, 2))

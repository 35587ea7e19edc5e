"""Sign-gradient tuning: codes and scales that make a block as a whole give the original's output.

Everything before this treats one layer at a time. Here all layers of a block move together, by gradients of
the block's own output error through its attention, activations and norms: what one layer's rounding did wrong
another may put right. The inputs are those that the blocks before, quantized, really give; so errors that
came with them are put right as well. SignRound's way (arXiv 2309.05516): a rounding offset for each weight
and a factor for each scale, moved by the sign of their gradients with a step that falls to zero.

The offsets begin where the search ended: at the distance of each weight from its code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from awq.model.layers import linears_of
from awq.pipeline.observe import Batch
from awq.search import Codes

# Sum of all steps of an offset: enough to carry a weight over a boundary, not much more.
_TRAVEL = 0.5
# How far an offset begins from the next boundary, at least, and how far it may go.
_START, _FARTHEST = 0.45, 1.0
# A scale's step as a share of an offset's.
_SCALE_STEP = 0.05
_SEED = 7


@dataclasses.dataclass
class _Moving:
    """One layer: what stays, and what the gradients move."""

    levels: int  # the largest code
    base: Tensor  # whole numbers, codes less zero points, [out, groups, size]
    lowest: Tensor  # of them, [out, groups, 1]
    scales: Tensor
    offset: Tensor
    factor: Tensor

    @classmethod
    def of(cls, weight: Tensor, codes: Codes, levels: int) -> _Moving:
        scales = codes.scales.float().unsqueeze(-1)
        zeros = codes.zeros.float().unsqueeze(-1)
        base = codes.codes.view(*codes.scales.shape, -1).float() - zeros
        offset = (weight.view_as(base) / scales - base).clamp_(-_START, _START)
        factor = torch.zeros_like(scales).requires_grad_()
        return cls(levels, base, -zeros, scales, offset.requires_grad_(), factor)

    def numbers(self) -> Tensor:
        """Whole numbers as they are now; gradients pass to the offsets unchanged."""
        moved = self.base + self.offset
        rounded = moved + (moved.round() - moved).detach()
        return torch.minimum(torch.maximum(rounded, self.lowest), self.lowest + self.levels)

    def values(self) -> Tensor:
        """The weight, `[out, in]`."""
        return (self.numbers() * (self.scales * (1 + self.factor))).flatten(1)

    @torch.no_grad()
    def step(self, size: float) -> None:
        """Move against the sign of the gradients."""
        for parameter, share in ((self.offset, size), (self.factor, size * _SCALE_STEP)):
            if parameter.grad is not None:
                parameter -= share * parameter.grad.sign()
                parameter.grad = None
        self.offset.clamp_(-_FARTHEST, _FARTHEST)

    @torch.no_grad()
    def codes(self, start: Codes) -> Codes:
        """As they are stored."""
        codes = (self.numbers() - self.lowest).to(torch.uint8).flatten(1)
        scales = (self.scales * (1 + self.factor)).squeeze(-1).to(start.scales.dtype)
        return Codes(codes, scales, start.zeros)


def tune(
    block: nn.Module,
    codes: Mapping[str, Codes],
    batches: Sequence[Batch],
    targets: Sequence[Tensor],
    steps: int,
    bits: Mapping[str, int],
    device: torch.device,
) -> dict[str, Codes]:
    """Codes that lessen the block's output error, batch after batch in a shuffled order.

    Args:
        block: its float weights in place, folded as `codes` want them.
        codes: where to start, for each quantized layer.
        batches: inputs as the quantized blocks before give them.
        targets: the original block's outputs for its original inputs.
        steps: batches to learn from.
        bits: width of a code, by layer.
        device: where the block is.
    """
    linears = linears_of(block)
    moving = {
        name: _Moving.of(linears[name].weight.data, layer, 2 ** bits[name] - 1)
        for name, layer in codes.items()
    }
    generator = torch.Generator().manual_seed(_SEED)
    order: list[int] = []
    for step in range(steps):
        if not order:
            order = torch.randperm(len(batches), generator=generator).tolist()
        index = order.pop()
        with torch.enable_grad():
            weights = {f"{name}.weight": layer.values() for name, layer in moving.items()}
            _loss(block, weights, batches[index], targets[index], device).backward()
        for layer in moving.values():
            layer.step(2 * _TRAVEL / steps * (1 - step / steps))
    return {name: layer.codes(codes[name]) for name, layer in moving.items()}


def _loss(
    block: nn.Module, weights: dict[str, Tensor], batch: Batch, target: Tensor, device: torch.device
) -> Tensor:
    """Mean squared error of the output, relative to the mean square of what the block adds."""

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return functional_call(block, weights, args, kwargs)

    change, own = batch.against(batch.call.run(replaced, batch.hidden.to(device)), target)
    return change.square().sum() / own.square().sum().clamp_min(torch.finfo(torch.float32).tiny)

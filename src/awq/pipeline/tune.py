"""Tuning by gradients: codes and scales that make a block as a whole give the original's output.

Everything before this treats one layer at a time. Here all layers of a block move together, by gradients of
the block's own output error through its attention, activations and norms: what one layer's rounding did wrong
another may put right. The inputs are those that the blocks before, quantized, really give; so errors that
came with them are put right as well. As SignRound does (arXiv 2309.05516), a rounding offset for each weight
and a factor for each scale are learnt; but by Adam's steps (arXiv 1412.6980), from where the search ended.

All offsets begin at zero, half a step from either boundary: only a gradient that keeps its direction carries
a code over, and the errors that GPTQ made to cancel one another stay as they are. A step by the sign alone
goes as far where the gradient is noise, which costs half of the gain.

Some batches teach and others judge: of several states on the way, and of the start, the one that does best on
batches it has not learnt from is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from awq.pipeline.block import judged
from awq.pipeline.observe import Batch
from awq.search import Codes

# Sum of all steps of an offset whose gradient keeps its direction: twice what carries a code over a boundary.
_TRAVEL = 1.0
# How far an offset may go.
_FARTHEST = 1.0
# A scale's step as a share of an offset's.
_SCALE_STEP = 0.05
# How slowly the mean gradient forgets, and its mean square.
_MOMENTUM, _SQUARES = 0.9, 0.99
# Every so many batches one judges and does not teach, and the states on the way that are judged.
_HELD_OUT, _JUDGED = 8, 8
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
    means: tuple[Tensor, Tensor]  # of the gradients of both
    squares: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, codes: Codes, levels: int) -> _Moving:
        scales = codes.scales.float().unsqueeze(-1)
        zeros = codes.zeros.float().unsqueeze(-1)
        base = codes.codes.view(*codes.scales.shape, -1).float() - zeros
        offset, factor = torch.zeros_like(base), torch.zeros_like(scales)
        means, squares = ((torch.zeros_like(base), torch.zeros_like(scales)) for _ in range(2))
        moved = offset.requires_grad_(), factor.requires_grad_()
        return cls(levels, base, -zeros, scales, *moved, means, squares)

    def numbers(self) -> Tensor:
        """Whole numbers as they are now."""
        return (self.base + self.offset).round_().clamp_(self.lowest, self.lowest + self.levels)

    def values(self) -> Tensor:
        """The weight, `[out, in]`, with gradients."""
        values: Tensor = _Values.apply(self.offset, self.factor, self)
        return values

    @torch.no_grad()
    def step(self, size: float, number: int) -> None:
        """Move against the gradients of step `number`, counted from 1; `size` is an offset's longest step."""
        moved = (self.offset, size), (self.factor, size * _SCALE_STEP)
        for (parameter, longest), mean, square in zip(moved, self.means, self.squares, strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            mean.lerp_(gradient, 1 - _MOMENTUM)
            square.mul_(_SQUARES).addcmul_(gradient, gradient, value=1 - _SQUARES)
            root = (square / (1 - _SQUARES**number)).sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
            # The mean begins at zero and is left so: the first steps are short.
            parameter.addcdiv_(mean, root, value=-longest)
            parameter.grad = None
        self.offset.clamp_(-_FARTHEST, _FARTHEST)

    @torch.no_grad()
    def codes(self, start: Codes) -> Codes:
        """As they are stored."""
        codes = (self.numbers() - self.lowest).to(torch.uint8).flatten(1)
        scales = (self.scales * (1 + self.factor)).squeeze(-1).to(start.scales.dtype)
        return Codes(codes, scales, start.zeros)


class _Values(torch.autograd.Function):
    """A layer's values by hand: of each weight nothing but its value is kept for the gradients."""

    @staticmethod
    def forward(ctx: Any, offset: Tensor, factor: Tensor, layer: _Moving) -> Tensor:
        ctx.layer = layer
        return (layer.numbers() * (layer.scales * (1 + factor))).flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Rounding passes gradients unchanged; at the first and last code half of them, and none beyond."""
        layer = ctx.layer
        gradient = gradient.view_as(layer.base)
        rounded = (layer.base + layer.offset).round_() - layer.lowest
        passed = ((rounded >= 0) & (rounded <= layer.levels)).float()
        passed += (rounded > 0) & (rounded < layer.levels)
        offset = gradient * (layer.scales * (1 + layer.factor)) * passed.mul_(0.5)
        factor = (gradient * layer.numbers()).sum(-1, keepdim=True) * layer.scales
        return offset, factor, None


def teaching(batches: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Those that teach, and those that judge: taken evenly, and the same ones where there is but one."""
    held = batches[::_HELD_OUT]
    return [batch for number, batch in enumerate(batches) if number % _HELD_OUT] or batches, held


def tune(
    block: nn.Module,
    codes: Mapping[str, Codes],
    batches: Sequence[Batch],
    targets: Sequence[Tensor],
    steps: int,
    bits: Mapping[str, int],
    device: torch.device,
    judge: Callable[[], float],
) -> dict[str, Codes]:
    """Codes that lessen the block's output error, batch after batch in a shuffled order.

    Args:
        block: its float parameters in place, folded as `codes` want them.
        codes: where to start, for each quantized layer.
        batches: inputs as the quantized blocks before give them.
        targets: the original block's outputs for its original inputs.
        steps: batches to learn from.
        bits: width of a code, by layer.
        device: where the block is.
        judge: the block's error as it stands, on batches that are not among `batches`.
    """
    moving = {name: _Moving.of(layer, 2 ** bits[name] - 1) for name, layer in codes.items()}
    generator = torch.Generator().manual_seed(_SEED)
    order: list[int] = []
    best, least = dict(codes), judged(block, codes, judge)
    every = -(-steps // _JUDGED)
    for step in range(steps):
        if not order:
            order = torch.randperm(len(batches), generator=generator).tolist()
        index = order.pop()
        with torch.enable_grad():
            weights = {f"{name}.weight": layer.values() for name, layer in moving.items()}
            _loss(block, weights, batches[index], targets[index], device).backward()
        for layer in moving.values():
            layer.step(2 * _TRAVEL / steps * (1 - step / steps), step + 1)
        if (step + 1) % every == 0 or step + 1 == steps:
            now = {name: layer.codes(codes[name]) for name, layer in moving.items()}
            if (error := judged(block, now, judge)) < least:
                best, least = now, error
    return best


def _loss(
    block: nn.Module, weights: dict[str, Tensor], batch: Batch, target: Tensor, device: torch.device
) -> Tensor:
    """Mean squared error of the output, relative to the mean square of what the block adds."""

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return functional_call(block, weights, args, kwargs)

    change, own = batch.against(batch.call.run(replaced, batch.hidden.to(device)), target)
    return change.square().sum() / own.square().sum().clamp_min(torch.finfo(torch.float32).tiny)

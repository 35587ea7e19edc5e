"""The proof: a fold is right when random scales leave the block's output unchanged.

Scales of up to e and down to 1/e are folded into the producer and compensated in the consumers, in float32.
If any other consumer reads the scaled tensor (a router, a residual branch), or the producer's rule is not
what it seemed, the output changes and the fold is dropped, by name and with the measured change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from awq.model.experts import Experts, expert_names, rerouted, rotated, rotations
from awq.model.layers import Fold, rows_of, scale_rows, scaled

# A block's output: hidden states, or those and what it leaves for later blocks.
Output = Tensor | Sequence[Tensor]

# Largest change of a channel of the output, relative to its largest value, that counts as rounding noise.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Proof:
    """A fold and how much it changed the block's output: the worst channel, relative to its largest value."""

    fold: Fold
    change: float

    @property
    def holds(self) -> bool:
        """Whether the change is rounding noise."""
        return self.change <= TOLERANCE


def prove(block: nn.Module, folds: Iterable[Fold], run: Callable[[], Output]) -> list[Proof]:
    """Measure each fold on its own, then all that hold together.

    Args:
        block: float32 weights in place; it is left as it was.
        folds: proposals.
        run: runs the block on a few inputs of several tokens and returns its output, each `[..., channels]`.
    """
    every = _through_all_experts(block, run)
    reference = every()
    proofs = [
        Proof(fold, change)
        for alike in _alike(block, folds)
        for fold, change in zip(alike, _changes(block, alike, every, reference), strict=True)
    ]
    together = [proof.fold for proof in proofs if proof.holds]
    if len(together) > 1:
        change = _change(block, together, every, reference)
        # Folds that hold alone but not together cannot be told apart: all of them go.
        if change > TOLERANCE:
            return [dataclasses.replace(proof, change=max(proof.change, change)) for proof in proofs]
    return proofs


def apply(block: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Fold `scale` `[free]` into the block for good: producer rows divided, consumer columns multiplied."""
    module = block.get_submodule(fold.producer)
    factors = _factors(module, fold, scale)
    for name in (fold.weight, fold.bias):
        parameter = module._parameters.get(name)
        if parameter is not None:
            parameter.data = scale_rows(parameter.data, name == fold.weight, fold.rule, factors)
    for consumer in fold.consumers:
        weight = block.get_parameter(f"{consumer}.weight")
        weight.data = weight.data * _columns(fold, scale)


def _through_all_experts(block: nn.Module, run: Callable[[], Output]) -> Callable[[], list[Tensor]]:
    """`run` as it is, which shows that routing is the same, and such that every expert has its turn."""
    rerouting = any(isinstance(module, Experts) for module in block.modules())

    def outputs() -> list[Tensor]:
        output = run()
        return [output] if isinstance(output, Tensor) else list(output)

    def every() -> list[Tensor]:
        found: list[Tensor] = []
        for steps in range(rotations(block)):
            with rotated(block, steps):
                found += outputs()
        if rerouting:
            with rerouted(block, "all"):
                found += outputs()
        return found

    return every


def _alike(block: nn.Module, folds: Iterable[Fold]) -> Iterator[list[Fold]]:
    """Folds that stand at the same place in the experts of a layer, together; others alone."""
    within = expert_names(block)
    groups: dict[tuple[str, ...], list[Fold]] = {}
    for fold in folds:
        place = within.get(fold.producer)
        key = (fold.producer, *fold.consumers) if place is None else (place.owner, place.rest)
        groups.setdefault((*key, fold.rule), []).append(fold)
    yield from groups.values()


def _changes(
    block: nn.Module, folds: list[Fold], run: Callable[[], list[Tensor]], reference: list[Tensor]
) -> list[float]:
    """The change that each fold makes; where all together make none, none is tried alone."""
    change = _change(block, folds, run, reference)
    if len(folds) == 1 or change <= TOLERANCE:
        return [change] * len(folds)
    return [_change(block, [fold], run, reference) for fold in folds]


def _change(
    block: nn.Module, folds: list[Fold], run: Callable[[], list[Tensor]], reference: list[Tensor]
) -> float:
    with ExitStack() as stack:
        for number, fold in enumerate(folds):
            generator = torch.Generator().manual_seed(number)
            random = torch.rand(len(fold.rows), generator=generator) * 2 - 1
            scale = random.exp().to(fold.tie.device)
            module = block.get_submodule(fold.producer)
            factors = _factors(module, fold, scale)
            stack.enter_context(scaled(module, fold.rule, factors, fold.weight, fold.bias))
            for consumer in fold.consumers:
                stack.enter_context(_compensated(block.get_submodule(consumer), _columns(fold, scale)))
        changed = run()
    return max(_difference(new, old) for new, old in zip(changed, reference, strict=True))


def _difference(changed: Tensor, reference: Tensor) -> float:
    """The worst channel's change.

    A channel is judged by its own size, and a small one by that of most others: in a trained model a few
    channels are thousands of times as large, and would hide any mistake in the rest.
    """
    sizes = reference.flatten(0, -2).abs().amax(0)
    sizes = sizes.clamp_min(sizes.median()).clamp_min(torch.finfo(torch.float32).tiny)
    change = float(((changed - reference).abs() / sizes).max())
    return change if change == change else float("inf")


@contextmanager
def _compensated(linear: nn.Module, columns: Tensor) -> Iterator[None]:
    """A linear layer with its columns multiplied, for the time of a `with` block."""
    kept = linear._parameters["weight"]
    assert kept is not None  # linear layers have one
    linear._parameters["weight"] = nn.Parameter(kept.data * columns, requires_grad=False)
    try:
        yield
    finally:
        linear._parameters["weight"] = kept


def _factors(module: nn.Module, fold: Fold, scale: Tensor) -> Tensor:
    """What to multiply the producer's rows with: 1 / scale on the fold's rows, 1 elsewhere."""
    factors = torch.ones(rows_of(module, fold.weight), device=scale.device)
    factors[fold.rows] = 1 / scale
    return factors


def _columns(fold: Fold, scale: Tensor) -> Tensor:
    """What to multiply the consumers' columns with."""
    return torch.where(fold.tie >= 0, scale[fold.tie.clamp_min(0)], torch.ones_like(scale[:1]))

"""Which rows of a producer are behind each channel of an input: read off by experiment.

Rows are told apart by writing their number in base 32 and giving each digit one of 32 factors: two or three
runs of a few tokens for thousands of rows. The probe is a batch of *single* tokens, because attention over
one token returns its value whatever the query and key: so the value rows of any fused q/k/v layout, tied
over query heads or not, are found by the same experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from awq.model.layers import (
    Fold,
    Rule,
    inputs_of,
    rows_of,
    scaled,
)

# The factors of the 32 digits: evenly spaced in the logarithm over [1/2, 2], none of them 1.
_LEVELS = 32


_STEP = 4.0 ** (1 / _LEVELS)


# A ratio is believed when it is this constant over the probe's tokens, and this close to a digit's factor.
CONSTANT = 1e-3


_CLOSE = 0.25  # of the distance between neighbouring factors


Producer = tuple[str, nn.Module, tuple[str, str]]


def producers(block: nn.Module) -> Iterator[Producer]:
    """What may be scaled: name, module, and its parameters in the roles of weight and bias.

    These are linear layers, norms (a weight vector, perhaps a bias), and vectors of any other name: each
    alone, and the first two of a module that has just those, for a norm may call them anything.
    """
    for path, module in block.named_modules():
        vectors = [name for name, p in module._parameters.items() if p is not None and p.dim() == 1]
        weight = module._parameters.get("weight")
        if weight is not None and (weight.dim() == 1 or isinstance(module, nn.Linear)):
            yield path, module, ("weight", "bias")
        elif weight is None:
            yield from ((path, module, (name, "")) for name in vectors)
            if len(vectors) == 2:
                yield path, module, (vectors[0], vectors[1])


def in_running_order(producers: Iterator[Producer], run: Callable[[], object]) -> list[Producer]:
    """Those that run, in the order in which they first do."""
    ran: list[str] = []
    found = list(producers)
    with ExitStack() as stack:
        for path, module in {path: module for path, module, _ in found}.items():

            def note(_: nn.Module, __: Any, path: str = path) -> None:
                ran.append(path)

            stack.callback(module.register_forward_pre_hook(note).remove)
        run()
    place = {path: len(ran) - number for number, path in enumerate(reversed(ran))}
    return sorted((item for item in found if item[0] in place), key=lambda item: place[item[0]])


def read_rows(
    block: nn.Module,
    producer: str,
    module: nn.Module,
    names: tuple[str, str],
    inputs: dict[str, tuple[str, ...]],
    before: dict[str, Tensor],
    run: Callable[[], object],
    changed: set[str],
) -> Iterator[Fold]:
    """Folds whose producer is `module`: for each shared input, the rows read off the changed ratios.

    Inputs that change in whatever way are added to `changed`.
    """
    weight = module._parameters[names[0]]
    assert weight is not None  # for the type checker: `producers` looked
    rules: tuple[Rule, ...] = ("factor", "one_plus" if weight.dim() == 1 else "square")
    count = weight.shape[0]
    watched = [first for first in inputs if first in before and producer not in inputs[first]]
    for rule in rules:
        for subset in _subsets(weight, [before[first].shape[1] for first in watched]):
            rows = subset.to(weight.device)
            ties = _decode(block, module, names, rule, rows, watched, before, run, changed)
            for first, tie in ties.items():
                used = torch.unique(tie[tie >= 0])
                back = torch.full((count,), -1, dtype=torch.long, device=tie.device)
                back[used] = torch.arange(len(used), device=tie.device)
                compact = torch.where(tie >= 0, back[tie.clamp_min(0)], tie)
                yield Fold(producer, rule, used, compact, inputs[first], *names)
            if ties:
                return


def _subsets(weight: Tensor, widths: list[int]) -> Iterator[Tensor]:
    """Sets of rows to scale together: all; and likely parts of a layer a few times as wide as an input.

    A fused gate/up layer acts as a plain factor in its up half only, and no single token can tell the halves
    apart. Others fuse three or four factors of one product.
    """
    count = weight.shape[0]
    yield torch.arange(count)
    for parts in (2, 3, 4):
        if weight.dim() == 2 and any(count == parts * width for width in widths):
            width = count // parts
            yield from (torch.arange(width * part, width * (part + 1)) for part in reversed(range(parts)))
            yield from (torch.arange(part, count, parts) for part in reversed(range(parts)))


def _decode(
    block: nn.Module,
    module: nn.Module,
    names: tuple[str, str],
    rule: Rule,
    rows: Tensor,
    watched: list[str],
    before: dict[str, Tensor],
    run: Callable[[], object],
    changed: set[str],
) -> dict[str, Tensor]:
    """For each watched input whose every live channel is a factor of one row: that row, int64 `[in]`."""
    count = int(rows.max()) + 1
    digits = 1
    while _LEVELS**digits < count:
        digits += 1
    found = {first: torch.zeros(before[first].shape[1], dtype=torch.long) for first in watched}
    live = {first: before[first].abs().amax(0).cpu() > 0 for first in watched}
    for position in range(digits):
        digit = (rows // _LEVELS**position) % _LEVELS
        factors = torch.ones(rows_of(module, names[0]), device=rows.device)
        factors[rows] = _factor(digit)
        with scaled(module, rule, factors, *names):
            after = inputs_of(block, run)
        for first in list(found):
            # An expert may get no token once its router's input has changed.
            now = after.get(first, before[first][:0])
            if not torch.equal(before[first], now):
                changed.add(first)
            level = _levels_of(before[first], now).cpu()
            if bool((level[live[first]] < 0).any()) or not bool(live[first].any()):
                del found[first]
            else:
                found[first] += level.clamp_min(0) * _LEVELS**position
        if not found:
            break
    known = set(rows.tolist())
    out = {}
    for first, tie in found.items():
        tie = torch.where(live[first], tie, torch.full_like(tie, -1))
        if set(tie[tie >= 0].tolist()) <= known:
            out[first] = _fill_dead(tie).to(rows.device)
    return out


def _fill_dead(tie: Tensor) -> Tensor:
    """A channel that the probe never lit (a ReLU) gets its row where all others lie on the identity."""
    identity = torch.arange(len(tie))
    return identity if bool((tie[tie >= 0] == identity[tie >= 0]).all()) else tie


def _factor(digit: Tensor) -> Tensor:
    return torch.exp2(torch.log2(torch.tensor(_STEP)) * (digit - (_LEVELS - 1) / 2))


def _levels_of(before: Tensor, after: Tensor) -> Tensor:
    """The digit behind each channel's change, int64 `[in]`; -1 where the change is no factor of the code."""
    if before.shape != after.shape:
        return torch.full((before.shape[1],), -1)
    before, after = before.double(), after.double()
    energy = before.square().sum(0)
    ratio = (before * after).sum(0) / energy.clamp_min(1e-300)
    residual = (after - ratio * before).square().sum(0)
    exact = torch.log2(ratio.clamp_min(1e-30)) / torch.log2(torch.tensor(_STEP)) + (_LEVELS - 1) / 2
    level = exact.round()
    good = (residual <= CONSTANT**2 * energy) & ((exact - level).abs() < _CLOSE)
    good &= (level >= 0) & (level < _LEVELS)
    return torch.where(good, level, torch.full_like(level, -1)).long()

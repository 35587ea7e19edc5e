"""Which layers share an input, and which producer's rows decide its channels: found by experiment.

A scale can be moved from a linear layer's input channels into whatever produced them, when the producer acts
on each channel as a plain factor: a norm's weight, the rows of a preceding linear layer seen through an
elementwise product, an attention average, a ReLU, a repetition of heads. Instead of listing architectures,
each candidate producer's rows are multiplied by known factors and the inputs of all linear layers are
watched: where a channel's input changes by one constant ratio, the ratio tells which row is behind it.

How the ratios are read is told in `awq.model.rows`.

What this proposes is only a proposal: `awq.model.invariance` proves each fold on longer inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from awq.model.experts import ExpertName, expert_names, rerouted, rotated, rotations
from awq.model.layers import (
    Fold,
    Structure,
    inputs_of,
)
from awq.model.rows import CONSTANT, in_running_order, producers, read_rows


def propose(block: nn.Module, run: Callable[[], object], probe_run: Callable[[], object]) -> Structure:
    """Discover the structure of a block whose weights are loaded.

    Args:
        block: float32, in eval mode.
        run: runs the block on a few longer inputs.
        probe_run: runs it on a batch of single tokens.
    """
    within = expert_names(block)
    with rerouted(block, "all"):
        inputs = _shared_inputs(inputs_of(block, partial(_everywhere, block, run)), within)
    best: dict[str, Fold] = {}
    behind: dict[str, str] = {}
    with rerouted(block, "first"):
        before = inputs_of(block, probe_run)
        examples = _examples(before, within)
        for producer, module, names in in_running_order(producers(block), probe_run):
            if producer in within and within[producer].number != examples.get(within[producer].owner):
                continue  # experts of a layer are alike: what is found in one is proposed for all
            changed: set[str] = set()
            found = read_rows(block, producer, module, names, inputs, before, probe_run, changed)
            for fold, firsts in _merged(found):
                for first in firsts:
                    if first not in best or len(fold.rows) > len(best[first].rows):
                        best[first] = fold
            behind.update(dict.fromkeys(changed, producer))
    for fold in list(best.values()):
        best.update({copy.consumers[0]: copy for copy in _for_other_experts(fold, within, inputs)})
    # A fold that has several inputs stands behind each of them.
    folds = tuple({id(best[name]): best[name] for name in inputs if name in best}.values())
    return Structure(inputs, folds, dict(_behind(behind, within, inputs, best)))


def _merged(folds: Iterator[Fold]) -> Iterator[tuple[Fold, list[str]]]:
    """Folds of one producer, those of equal rows and ties as one: whoever scales it must tell all readers.

    Each comes with the first readers of its inputs. Inputs may differ by what has been done to them in
    between (shifts in time, products), as long as their channels are the same.
    """
    groups: list[list[Fold]] = []
    for fold in folds:
        for group in groups:
            alike = group[0].rule == fold.rule and group[0].bias == fold.bias
            if alike and torch.equal(group[0].rows, fold.rows) and torch.equal(group[0].tie, fold.tie):
                group.append(fold)
                break
        else:
            groups.append([fold])
    for group in groups:
        readers = tuple(name for fold in group for name in fold.consumers)
        yield dataclasses.replace(group[0], consumers=readers), [fold.consumers[0] for fold in group]


def _for_other_experts(
    fold: Fold, within: dict[str, ExpertName], inputs: dict[str, tuple[str, ...]]
) -> Iterator[Fold]:
    """The same fold in the other experts of the layer, where `fold` lies in an expert."""
    place = within.get(fold.producer)
    if place is None:
        return
    for number in set(range(place.count)) - {place.number}:
        names = [within[name].of(number) for name in (fold.producer, *fold.consumers) if name in within]
        if len(names) == 1 + len(fold.consumers) and inputs.get(names[1]) == tuple(names[1:]):
            yield dataclasses.replace(fold, producer=names[0], consumers=tuple(names[1:]))


def _behind(
    seen: dict[str, str],
    within: dict[str, ExpertName],
    inputs: dict[str, tuple[str, ...]],
    best: dict[str, Fold],
) -> Iterator[tuple[str, str]]:
    """What was seen behind the inputs that have no fold; experts of a layer are alike here too."""
    for first, producer in seen.items():
        numbers = range(within[first].count) if first in within else (0,)
        for number in numbers:
            name, other = (within[x].of(number) if x in within else x for x in (first, producer))
            if name in inputs and name not in best:
                yield name, other


def _everywhere(block: nn.Module, run: Callable[[], object]) -> None:
    """Run with every expert in every place; a layer keeps the first input it gets."""
    for steps in range(rotations(block)):
        with rotated(block, steps):
            run()


def _examples(before: dict[str, Tensor], within: dict[str, ExpertName]) -> dict[str, int]:
    """For each layer of experts the one that saw the most rows of the probe."""
    rows: dict[str, dict[int, int]] = {}
    for name, tensor in before.items():
        if name in within:
            place = within[name]
            rows.setdefault(place.owner, {})[place.number] = len(tensor)
    return {owner: max(sorted(seen), key=lambda number: seen[number]) for owner, seen in rows.items()}


def _shared_inputs(seen: dict[str, Tensor], within: dict[str, ExpertName]) -> dict[str, tuple[str, ...]]:
    """Group layers whose inputs are equal, in the order in which they ran.

    An expert's tokens may be weighted before it reads them, and are some of all tokens: its inputs need only
    be multiples row by row, or rows found among the others. An expert without tokens reads what others of
    its layer read.
    """
    groups: dict[str, list[str]] = {}
    idle = [name for name, tensor in seen.items() if name in within and not bool(tensor.any())]
    for name, tensor in seen.items():
        if name in idle:
            continue
        for first, members in groups.items():
            same = _same_rows if name in within else torch.equal
            if same(seen[first], tensor):
                members.append(name)
                break
        else:
            groups[name] = [name]
    for name in idle:
        groups.setdefault(_group_of_others(within[name], groups, within) or name, []).append(name)
    return {first: tuple(members) for first, members in groups.items()}


def _group_of_others(
    place: ExpertName, groups: dict[str, list[str]], within: dict[str, ExpertName]
) -> str | None:
    """The group in which the same layer of other experts reads what is not one expert's own."""
    for first, members in groups.items():
        places = [within[name] for name in members if name in within]
        alike = {p.number for p in places if (p.owner, p.rest) == (place.owner, place.rest)}
        if alike and (len(alike) > 1 or len(places) < len(members)):
            return first
    return None


def _same_rows(rows: Tensor, others: Tensor) -> bool:
    """Whether each row of `others` is a multiple of the row of `rows`, or all are found among `rows`.

    Zeros are a multiple of anything, and tell nothing.
    """
    if torch.equal(rows, others):
        return True
    if rows.shape[1] != others.shape[1] or not bool(others.any()):
        return False
    if len(rows) != len(others):
        return all(bool((rows == row).all(1).any()) for row in others)
    factor = (rows * others).sum(1) / rows.square().sum(1).clamp_min(1e-30)
    residual = (others - factor.unsqueeze(1) * rows).square().sum(1)
    return bool((residual <= CONSTANT**2 * others.square().sum(1)).all())

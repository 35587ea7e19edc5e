"""Which layers share an input, and which producer's rows decide its channels: found by experiment.

A scale can be moved from a linear layer's input channels into whatever produced them, when the producer acts
on each channel as a plain factor: a norm's weight, the rows of a preceding linear layer seen through an
elementwise product, an attention average, a ReLU, a repetition of heads. Instead of listing architectures,
each candidate producer's rows are multiplied by known factors and the inputs of all linear layers are
watched: where a channel's input changes by one constant ratio, the ratio tells which row is behind it.

Rows are told apart by writing their number in base 32 and giving each digit one of 32 factors: two or three
runs of a few tokens for thousands of rows. The probe is a batch of *single* tokens, because attention over
one token returns its value whatever the query and key: so the value rows of any fused q/k/v layout, tied
over query heads or not, are found by the same experiment.

What this proposes is only a proposal: `awq.model.invariance` proves each fold on longer inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from awq.model.experts import ExpertName, expert_names, rerouted, rotated, rotations

Rule = Literal["factor", "one_plus", "square"]

# The factors of the 32 digits: evenly spaced in the logarithm over [1/2, 2], none of them 1.
_LEVELS = 32
_STEP = 4.0 ** (1 / _LEVELS)
# A ratio is believed when it is this constant over the probe's tokens, and this close to a digit's factor.
_CONSTANT = 1e-3
_CLOSE = 0.25  # of the distance between neighbouring factors


@dataclasses.dataclass(frozen=True)
class Fold:
    """A producer and the layers that read what it produces.

    Args:
        producer: module name inside the block.
        rule: `factor` multiplies the producer's weight (and bias), `one_plus` is for norms that apply 1 + w,
            `square` multiplies by the root, for layers whose output is squared behind them (ReLU²).
        rows: int64 `[free]`, the producer's rows that may be scaled.
        tie: int64 `[in]`, for each input channel of the consumers the index into `rows`, or -1.
        consumers: names of the linear layers whose input channels are compensated.
        weight, bias: the producer's parameters that are scaled, by their names there; a bias that does not
            exist is passed over.
    """

    producer: str
    rule: Rule
    rows: Tensor
    tie: Tensor
    consumers: tuple[str, ...]
    weight: str = "weight"
    bias: str = "bias"

    @property
    def source(self) -> str:
        """The producer, for a person: with the parameter's name where that is an unusual one."""
        name = "" if self.weight == "weight" else self.weight
        return f"{self.producer}.{name}".strip(".")


@dataclasses.dataclass(frozen=True)
class Structure:
    """What was found in one kind of block.

    Args:
        inputs: linear layers by shared input: `{first layer's name: all layers that read the same tensor}`.
        folds: proposals, at most one for each input.
        behind: for an input without a proposal, the last norm or linear layer that has an effect on it,
            which is no plain factor; no entry where there is none.
        denied: producers that the user does not want scaled, by input.
    """

    inputs: dict[str, tuple[str, ...]]
    folds: tuple[Fold, ...]
    behind: dict[str, str] = dataclasses.field(default_factory=dict)
    denied: dict[str, str] = dataclasses.field(default_factory=dict)


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The block's linear layers by name, in order of definition."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def readers_of(block: nn.Module) -> dict[str, nn.Module]:
    """Every module that may multiply its input with a matrix `weight` `[out, in]` of its own.

    Beside linear layers these are the routers of mixtures of experts, which are modules of many classes.
    Whether they do multiply so is not asked here: a fold that takes them for what they are not fails its
    proof.
    """
    out = {}
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            out[name] = module
    return out


def width_of(reader: nn.Module) -> int:
    """Input channels of a module in `readers_of`."""
    weight = reader._parameters["weight"]
    assert weight is not None  # readers are found by their weight
    return weight.shape[1]


@contextmanager
def watch_inputs(block: nn.Module, seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `seen(name, input)` whenever a linear layer, or a module like one, of the block runs."""
    with ExitStack() as stack:
        for name, reader in readers_of(block).items():

            def hook(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
                if given is not None and given.shape[-1] == width_of(module):
                    seen(name, given)

            stack.callback(reader.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def propose(block: nn.Module, run: Callable[[], object], probe_run: Callable[[], object]) -> Structure:
    """Discover the structure of a block whose weights are loaded.

    Args:
        block: float32, in eval mode.
        run: runs the block on a few longer inputs.
        probe_run: runs it on a batch of single tokens.
    """
    within = expert_names(block)
    with rerouted(block, "all"):
        inputs = _shared_inputs(_inputs_of(block, partial(_everywhere, block, run)), within)
    best: dict[str, Fold] = {}
    behind: dict[str, str] = {}
    with rerouted(block, "first"):
        before = _inputs_of(block, probe_run)
        examples = _examples(before, within)
        for producer, module, names in _in_running_order(_producers(block), probe_run):
            if producer in within and within[producer].number != examples.get(within[producer].owner):
                continue  # experts of a layer are alike: what is found in one is proposed for all
            changed: set[str] = set()
            found = _read_rows(block, producer, module, names, inputs, before, probe_run, changed)
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


def _inputs_of(block: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Input of each linear layer as `[rows, in]`; a layer that runs several times keeps its first input.

    Zeros (an expert whose turn it is not) say nothing of where an input comes from, and give way to the next.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str, inputs: Tensor) -> None:
        if name not in seen or not bool(seen[name].any()):
            seen[name] = inputs.reshape(-1, inputs.shape[-1])

    with watch_inputs(block, note):
        run()
    return seen


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
    return bool((residual <= _CONSTANT**2 * others.square().sum(1)).all())


Producer = tuple[str, nn.Module, tuple[str, str]]


def _producers(block: nn.Module) -> Iterator[Producer]:
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


def _in_running_order(producers: Iterator[Producer], run: Callable[[], object]) -> list[Producer]:
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


def _read_rows(
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
    assert weight is not None  # for the type checker: `_producers` looked
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
            after = _inputs_of(block, run)
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
    good = (residual <= _CONSTANT**2 * energy) & ((exact - level).abs() < _CLOSE)
    good &= (level >= 0) & (level < _LEVELS)
    return torch.where(good, level, torch.full_like(level, -1)).long()


@contextmanager
def scaled(
    module: nn.Module, rule: Rule, factors: Tensor, weight: str = "weight", bias: str = "bias"
) -> Iterator[None]:
    """Multiply what `module` produces, row by row, by `factors` for the time of a `with` block."""
    kept = {n: p for n in (weight, bias) if (p := module._parameters.get(n)) is not None}
    try:
        for name, parameter in kept.items():
            value = scale_rows(parameter.data, name == weight, rule, factors)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        module._parameters.update(kept)


def rows_of(module: nn.Module, name: str = "weight") -> int:
    """Rows of a producer: entries of a norm's weight, output features of a linear layer."""
    weight = module._parameters[name]
    assert weight is not None  # producers are found by their weight
    return weight.shape[0]


def scale_rows(value: Tensor, is_weight: bool, rule: Rule, factors: Tensor) -> Tensor:
    """A producer's weight, or its bias, with its rows multiplied by `factors` `[rows]`."""
    if rule == "one_plus" and is_weight:
        return (value + 1) * factors - 1
    if rule == "square":
        factors = factors.sqrt()
    return value * factors.view(-1, *[1] * (value.dim() - 1))

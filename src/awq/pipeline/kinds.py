"""Each kind of block: what is found in it, what is quantized, what stays float and why.

Which layers share an input decides which must be quantized together: inference engines fuse q/k/v and
gate/up, so siblings are quantized all or none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from awq.config import QuantConfig
from awq.errors import ConfigError, StructureError
from awq.formats import get_format
from awq.formats.entry import NO_CONV1D
from awq.model import kind_of
from awq.model.experts import expert_names
from awq.model.groups import propose
from awq.model.invariance import Output, Proof, prove
from awq.model.layers import Fold, Structure, linears_of, readers_of
from awq.model.overrides import Overrides

_NAMED = "named in modules_to_not_convert"
_SHARED = "other blocks share its weights"
_TURNED = "a Conv1D, which no reader of the {} layout takes"


@dataclasses.dataclass(frozen=True)
class KindPlan:
    """One kind of block: its structure, the folds that held, and what is quantized in it.

    `layers` are names inside the block; `skipped` gives the reason for each linear layer left float, and
    `others` tells of each further matrix what holds it. `shapes` are `(out, in)` of the linear layers.
    """

    name: str
    structure: Structure
    proofs: list[Proof]
    layers: tuple[str, ...]
    skipped: dict[str, str]
    others: dict[str, str] = dataclasses.field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def folds(self) -> list[Fold]:
        """Those that were proved."""
        return [proof.fold for proof in self.proofs if proof.holds]

    def describe(self, blocks: list[int]) -> dict[str, Any]:
        """As JSON values, for the report and for `awq inspect`."""
        return {
            "name": self.name,
            "blocks": blocks,
            "layers": list(self.layers),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "skipped": self.skipped,
            "others": self.others,
            "folds": [
                {
                    "producer": proof.fold.source,
                    "rule": proof.fold.rule,
                    "consumers": list(proof.fold.consumers),
                    "channels": len(proof.fold.rows),
                    "change": proof.change,
                    "proved": proof.holds,
                }
                for proof in self.proofs
            ],
            "unscaled": self.unscaled(),
        }

    def unscaled(self) -> dict[str, str]:
        """Layers that are quantized without a scale, with the reason."""
        ranked = sorted(self.proofs, key=lambda proof: proof.holds)
        proofs = {name: proof for proof in ranked for name in proof.fold.consumers}
        first_of = {name: first for first, members in self.structure.inputs.items() for name in members}
        reasons = {}
        for name in self.layers:
            behind = self.structure.behind.get(first_of[name])
            denied = self.structure.denied.get(first_of[name])
            if name not in proofs and denied:
                reasons[name] = f"overrides deny {denied} a scale"
            elif name not in proofs:
                reasons[name] = (
                    f"its input channels are no plain factors of {behind}"
                    if behind
                    else "no weight of the block comes before it"
                )
            elif not proofs[name].holds:
                producer, change = proofs[name].fold.source, proofs[name].change
                reasons[name] = (
                    f"folding into {producer} would change the output by {change:.0e}"
                    if math.isfinite(change)
                    else f"layers that did not run, or that blocks share, may have part in {producer}"
                )
        return reasons


def discover_kind(
    block: nn.Module,
    run: Callable[[], Output],
    probe_run: Callable[[], object],
    config: QuantConfig,
    named: frozenset[str],
    shared: frozenset[str] = frozenset(),
    overrides: Overrides | None = None,
    turned: frozenset[str] = frozenset(),
) -> KindPlan:
    """Find and prove the structure of a kind of block, and decide what is quantized in it.

    Args:
        block: a block of the kind, its float32 weights in place.
        run, probe_run: see `awq.model.invariance.prove` and `awq.model.groups.propose`.
        config: what to quantize to.
        named: layers of the block that `modules_to_not_convert` names.
        shared: modules of the block whose weights are other blocks' too: changed for one, they would be wrong
            for the others.
        overrides: corrections to what is found.
        turned: layers that the model keeps in a `Conv1D`.

    Raises:
        ConfigError: a fold that the user added cannot be proved; with the figure.
    """
    overrides = overrides or Overrides()
    with torch.no_grad():
        structure = overrides.apply(block, propose(block, run, probe_run))
        proofs = _unless_unknown(block, structure, prove(block, structure.folds, run), shared)
    overrides.require(proofs, type(block).__name__)
    skipped = _skip_reasons(block, structure, config, named, shared, turned)
    layers = tuple(name for members in structure.inputs.values() for name in members if name not in skipped)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears_of(block).items()}
    return KindPlan(type(block).__name__, structure, proofs, layers, skipped, _others(block, skipped), shapes)


def _others(block: nn.Module, skipped: Collection[str]) -> dict[str, str]:
    """Further matrices, with the class of the module that holds each and its shape."""
    out = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) or path in skipped:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1:
                shape = " x ".join(map(str, parameter.shape))
                out[f"{path}.{name}".lstrip(".")] = f"{type(module).__name__}, {shape}"
    return out


def _unless_unknown(
    block: nn.Module, structure: Structure, proofs: list[Proof], shared: frozenset[str]
) -> list[Proof]:
    """The same proofs, but for folds into shared weights, or ones that a layer which did not run might read.

    A layer that runs on image tokens alone, say, is seen by no probe of text: whether it reads a scaled
    tensor cannot be told, unless the widths do not fit.
    """
    ran = {name for members in structure.inputs.values() for name in members}
    widths = {linear.in_features for name, linear in linears_of(block).items() if name not in ran}
    return [
        dataclasses.replace(proof, change=math.inf)
        if len(proof.fold.tie) in widths or shared & {proof.fold.producer, *proof.fold.consumers}
        else proof
        for proof in proofs
    ]


def kinds_of(blocks: Sequence[nn.Module], marks: Sequence[Hashable]) -> list[list[int]]:
    """Indices of the blocks of each kind, kinds in order of first appearance.

    Args:
        blocks: the decoder blocks.
        marks: for each block by what else it may differ: layers to be left alone, and shared ones.
    """
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, (block, mark) in enumerate(zip(blocks, marks, strict=True)):
        kinds.setdefault((kind_of(block), mark), []).append(index)
    return list(kinds.values())


def _skip_reasons(
    block: nn.Module,
    structure: Structure,
    config: QuantConfig,
    named: frozenset[str],
    shared: frozenset[str] = frozenset(),
    turned: frozenset[str] = frozenset(),
) -> dict[str, str]:
    reasons: dict[str, str] = {}
    layout = get_format(config.format)
    ran = {name for members in structure.inputs.values() for name in members}
    routers = _routers(block)
    for name in readers_of(block):
        if name in linears_of(block):
            continue
        reasons[name] = f"a {type(block.get_submodule(name)).__name__} is no linear layer"
    for name, linear in linears_of(block).items():
        size = config.effective_group_size(linear.in_features)
        if name in named:
            reasons[name] = _NAMED
        elif name in shared:
            reasons[name] = _SHARED
        elif name in routers:
            reasons[name] = "it decides which experts a token goes to"
        elif name in turned and config.format in NO_CONV1D:
            reasons[name] = _TURNED.format(config.format)
        elif name not in ran:
            reasons[name] = "did not run on the probe text"
        elif reason := layout.supports(linear.out_features, linear.in_features, size, config.bits):
            reasons[name] = reason
    for members in structure.inputs.values():
        for name in members:
            parent = name.rpartition(".")[0]
            siblings = [other for other in members if other.rpartition(".")[0] == parent]
            floats = [other for other in siblings if other in reasons]
            if floats and name not in reasons:
                reasons[name] = f"engines fuse it with {floats[0]}, which stays float"
    experts: dict[str, list[str]] = {}
    for name, place in expert_names(block).items():
        experts.setdefault(place.owner, []).append(name)
    for layers in experts.values():
        floats = [name for name in layers if name in reasons]
        for name in layers if floats else ():
            reasons.setdefault(name, f"experts are quantized all or none, and {floats[0]} stays float")
    return reasons


def _routers(block: nn.Module) -> set[str]:
    """Linear layers beside a layer of experts that have one output for each of them."""
    inside = expert_names(block)
    counts: dict[str, int] = {}  # by the name of the module that owns the layer of experts, with a dot
    for place in inside.values():
        owner = place.owner.rpartition(".")[0]
        counts[f"{owner}." if owner else ""] = place.count
    return {
        name
        for name, linear in linears_of(block).items()
        for owner, count in counts.items()
        if name.startswith(owner) and name not in inside and linear.out_features == count
    }


def require_layers(kinds: Sequence[KindPlan], config: QuantConfig, blocks: Sequence[nn.Module]) -> None:
    """Refuse a setting that would quantize nothing.

    Args:
        kinds: the kind of each block.
        config: what to quantize to.
        blocks: the decoder blocks.

    Raises:
        ConfigError: with the group size that would serve most layers.
    """
    if any(kind.layers for kind in kinds):
        return
    served = {size: _served(kinds, config, blocks, size) for size in (128, 64, 32, 16, 8)}
    best = max(served, key=lambda size: (served[size], size))
    total = sum(len(linears_of(block)) for block in blocks)
    cure = f"; group_size={best} would serve {served[best]} of {total}" if served[best] else ""
    reasons = sorted({reason for kind in kinds for reason in kind.skipped.values()})
    raise ConfigError(
        f"group_size={config.group_size} with bits={config.bits} serves no layer of this model{cure} "
        f"({'; '.join(reasons) or 'its blocks have no linear layers'})"
    )


def require_scales(kinds: Sequence[KindPlan], config: QuantConfig) -> list[str]:
    """Refuse to search for scales in a model that has no place for any.

    Args:
        kinds: the kind of each block.
        config: what to quantize to.

    Returns:
        A note on each kind of block in which nothing can be scaled, while something can in others.

    Raises:
        StructureError: nothing can be scaled at all; plain rounding is the user's to choose.
    """
    idle = {id(kind): kind for kind in kinds if kind.layers and not kind.folds}
    if config.method != "awq" or not idle:
        return []
    told = []
    for kind in idle.values():
        count = sum(k is kind for k in kinds)
        first, *more = [f"{name}: {reason}" for name, reason in kind.unscaled().items()]
        others = f", and {len(more)} more layers" if more else ""
        told.append(f"nothing to scale in {count} x {kind.name} ({first}{others})")
    if any(kind.folds for kind in kinds):
        return told
    raise StructureError(
        f"AWQ scales nothing in this model: {'; '.join(told)}. Plain rounding works without scales: choose "
        "method='rtn' (--method rtn). `awq inspect` shows what was found"
    )


def _served(
    kinds: Sequence[KindPlan], config: QuantConfig, blocks: Sequence[nn.Module], group_size: int
) -> int:
    """Layers that another group size would quantize."""
    other = dataclasses.replace(config, group_size=group_size)
    count = 0
    for kind, block in zip(kinds, blocks, strict=True):
        # What no group size changes.
        lasting = (_NAMED, _SHARED, _TURNED.format(config.format))
        named = frozenset(name for name, reason in kind.skipped.items() if reason in lasting)
        count += len(linears_of(block)) - len(_skip_reasons(block, kind.structure, other, named))
    return count

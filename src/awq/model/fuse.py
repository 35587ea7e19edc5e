"""Experts put together again: for plain weights, which transformers itself has to load.

Some models keep all experts of a layer in one tensor and have no rule for experts apart. Quantized, theirs
are saved one by one, as engines want them; plain weights have to go back to where the model looks for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from awq.errors import StructureError
from awq.model.experts import parts_of
from awq.model.names import match_names
from awq.model.weights import View


@dataclasses.dataclass(frozen=True)
class Whole:
    """A tensor of all experts of a layer.

    Args:
        name: in the model, which loads it by this name.
        shape: `[experts, rows, columns]`.
        members: `{layer: its slice}`.
    """

    name: str
    shape: tuple[int, ...]
    members: dict[str, View]


def expert_place(model: nn.Module, path: str) -> tuple[str, int, str] | None:
    """Owner, number and projection, when `path` names a projection of an expert that the model keeps fused
    and transformers has no rule for."""
    head, _, projection = path.rpartition(".")
    owner, _, number = head.rpartition(".")
    with contextlib.suppress(AttributeError):
        parts = parts_of(model.get_submodule(owner)) or {}
        if number.isdigit() and any(projection in part.projections for part in parts.values()):
            return owner, int(number), projection
    return None


def experts_to_fuse(folder: Path, layers: Iterable[str]) -> list[Whole]:
    """The tensors that the model in a folder wants in the place of some of its layers.

    Args:
        folder: a model folder. One whose model transformers cannot make has none.
        layers: names as the checkpoint has them.
    """
    names = [name for name in layers if any(part.isdigit() for part in name.split(".")[-2:-1])]
    if not names:
        return []
    from awq.model.skeleton import build

    try:
        _, model = build(folder, False)
    except StructureError:
        return []
    named, _ = match_names(model, [f"{name}.weight" for name in names])
    wholes: dict[str, Whole] = {}
    for path, key in named.items():
        place = expert_place(model, path.removesuffix(".weight"))
        if place is None:
            continue
        owner, number, projection = place
        module = model.get_submodule(owner)
        for leaf, part in (parts_of(module) or {}).items():
            if projection not in part.projections:
                continue
            target, parameter = f"{owner}.{leaf}", module._parameters[leaf]
            assert parameter is not None  # parts are parameters that exist
            _, rows, columns = part.measures(parameter.shape)
            view = View(target, number, part.rows(projection, rows), part.transposed, (rows, columns))
            whole = wholes.setdefault(target, Whole(target, tuple(parameter.shape), {}))
            whole.members[key.removesuffix(".weight")] = view
    return list(wholes.values())

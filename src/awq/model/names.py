"""Checkpoint names and module names: two spellings of the same tensors.

transformers renames tensors while it loads (legacy prefixes, nested language models), and merges some (each
expert's projections into one parameter). Its own rules are asked, so that a model loads here exactly when it
loads there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from awq.errors import StructureError


@dataclasses.dataclass(frozen=True)
class Merge:
    """A checkpoint tensor that the model holds as a part of something.

    Args:
        key: its name in the checkpoint.
        renamed: that name after renaming, before merging.
        targets: names in the model of the parameters made of it.
        position: which of the rule's sources it matches.
        sources: how many sources the rule takes.
        steps: what is done, as `(operation, dimension)`.
    """

    key: str
    renamed: str
    targets: tuple[str, ...]
    position: int
    sources: int
    steps: tuple[tuple[str, int | None], ...]


def match_names(model: nn.Module, keys: Iterable[str]) -> tuple[dict[str, str], list[Merge]]:
    """Map checkpoint keys to names in the model.

    Args:
        model: a transformers model, possibly on the meta device.
        keys: names as the checkpoint has them.

    Returns:
        `{name in the model: checkpoint key}`, and the tensors that the model only takes through a conversion
        (several merged into one), which have no name of their own.

    Raises:
        StructureError: this version of transformers tells its renaming rules in a way unknown here.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(model)
    except (ImportError, TypeError, AttributeError) as error:
        raise StructureError(
            f"this version of transformers keeps its renaming rules elsewhere ({error}); "
            "install a version that OpenAWQ was tested with (see pyproject.toml)"
        ) from error
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", None)
    named: dict[str, str] = {}
    merges: list[Merge] = []
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if pattern is None:
            # A key that is a name already stays one, whatever the rules for older checkpoints make of it.
            named[key if name not in state and key in state else name] = key
            continue
        renamed, _ = rename_source_key(key, renamings, [])
        merges.append(_merge(key, renamed, name, pattern, by_pattern[pattern]))
    return named, merges


def _merge(key: str, renamed: str, target: str, pattern: str, rule: Any) -> Merge:
    first = rule.target_patterns[0]
    return Merge(
        key=key,
        renamed=renamed,
        targets=tuple(target.replace(first, other) for other in rule.target_patterns),
        position=rule.source_patterns.index(pattern),
        sources=len(rule.source_patterns),
        steps=tuple((type(step).__name__, getattr(step, "dim", None)) for step in rule.operations),
    )

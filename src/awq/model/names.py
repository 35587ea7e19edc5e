"""Checkpoint names and module names: two spellings of the same tensors.

transformers renames tensors while it loads (legacy prefixes, nested language models). Its own renaming rules
are asked, so that a model loads here exactly when it loads there.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from awq.errors import StructureError


def names_in_model(model: nn.Module, keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Map checkpoint keys to names in the model.

    Args:
        model: a transformers model, possibly on the meta device.
        keys: names as the checkpoint has them.

    Returns:
        `{name in the model: checkpoint key}`, and the keys that the model only takes through a conversion
        (several tensors merged into one), which have no name of their own.

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
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", None)
    named: dict[str, str] = {}
    converted: list[str] = []
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if pattern is not None:
            converted.append(key)
        else:
            named[name] = key
    return named, converted

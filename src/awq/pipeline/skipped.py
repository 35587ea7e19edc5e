"""What stays float: every layer of it for people, and in few names for engines."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from awq.model import Skeleton
from awq.pipeline.kinds import KindPlan

OUTSIDE = "outside the decoder blocks"


def left_float(skeleton: Skeleton, list_name: str, kind_of_block: Sequence[KindPlan]) -> dict[str, str]:
    """Every linear layer left float, under its checkpoint name, with the reason."""
    out = {}
    for i, kind in enumerate(kind_of_block):
        for layer, reason in kind.skipped.items():
            key = skeleton.keys[f"{list_name}.{i}.{layer}.weight"]
            out[key.removesuffix(".weight")] = reason
    tied = getattr(skeleton.model, "all_tied_weights_keys", {})
    for name, module in skeleton.model.named_modules():
        weight = f"{name}.weight"
        outside = isinstance(module, nn.Linear) and not name.startswith(f"{list_name}.")
        # A tied head has no weight of its own in the checkpoint.
        if outside and weight in skeleton.keys and weight not in tied:
            out[skeleton.keys[weight].removesuffix(".weight")] = OUTSIDE
    return out


def not_converted(
    skeleton: Skeleton, list_name: str, skipped: Mapping[str, str], quantized: Collection[str]
) -> list[str]:
    """The entries of `modules_to_not_convert`.

    Layers of the decoder blocks are named one by one. A vision tower, a projector and the like are named as a
    whole, because engines build them of other layers than transformers does, and both with and without
    `model.` in front, because engines differ there.

    Args:
        skeleton: the opened model.
        list_name: its list of decoder blocks.
        skipped: what `left_float` returned.
        quantized: checkpoint names of the quantized layers, of which no entry may be a part.
    """
    out = set(skipped)
    for branch in _branches(skeleton, list_name):
        bare = branch.removeprefix("model.")
        if any(bare in name for name in quantized):
            continue
        out = {name for name in out if not name.startswith(f"{branch}.") and name != branch}
        out |= {bare, f"model.{bare}"}
    return sorted(out)


def _branches(skeleton: Skeleton, list_name: str) -> Iterator[str]:
    """Checkpoint names of the largest modules beside the decoder blocks that hold layers of matrices."""
    model: Any = skeleton.model
    head = model.get_output_embeddings()
    parts = list_name.split(".")
    above = {".".join(parts[:depth]) for depth in range(len(parts))}
    for name, module in model.named_modules():
        beside = name and name.rpartition(".")[0] in above and name not in above | {list_name}
        if beside and module is not head and _has_matrices(module):
            spelled = _in_checkpoint(skeleton, name, module)
            if spelled is not None:
                yield spelled


def _has_matrices(module: nn.Module) -> bool:
    """Whether a module holds more than embeddings and norms."""
    inner = (child for child in module.modules() if not isinstance(child, nn.Embedding))
    return any(p is not None and p.dim() > 1 for child in inner for p in child._parameters.values())


def _in_checkpoint(skeleton: Skeleton, name: str, module: nn.Module) -> str | None:
    """How the checkpoint spells the name of a module; None if it spells it in several ways, or not at all."""
    found = set()
    for parameter, _ in module.named_parameters():
        key = skeleton.keys.get(f"{name}.{parameter}", "")
        found.add(key.removesuffix(f".{parameter}") if key.endswith(f".{parameter}") else None)
    return found.pop() if len(found) == 1 else None

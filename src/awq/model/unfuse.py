"""Replace fused experts in a model without weights, and tell where each projection's weight comes from.

A checkpoint keeps experts apart (most), or fused as the model does. In the first case each layer has a tensor
of its own; in the second it gets a *view*: a name of its own in the reader, behind which lies a slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from awq.errors import StructureError
from awq.model.experts import Experts, Part, parts_of
from awq.model.names import Merge
from awq.model.weights import CheckpointReader, View

# The only ways of making a fused parameter of experts that can be undone expert by expert.
_STACKED = ("MergeModulelist",)
_STACKED_IN_ROWS = ("MergeModulelist", "Concatenate")


def expert_of(merge: Merge, owner: str) -> tuple[int, str] | None:
    """Number and projection behind a merged tensor's name, or None when it is made in another way.

    Args:
        merge: the tensor.
        owner: name in the model of the module that holds all experts.
    """
    head, _, projection = merge.renamed.removesuffix(".weight").rpartition(".")
    head, _, number = head.rpartition(".")
    steps = _STACKED if merge.sources == 1 else _STACKED_IN_ROWS
    dims = (0, 1)[: len(steps)]
    stacked = merge.steps == tuple(zip(steps, dims, strict=True))
    within = head.rpartition(".")[2] == owner.rpartition(".")[2]
    if stacked and within and number.isdigit() and len(merge.targets) == 1:
        return int(number), projection
    return None


def gathered(
    merges: Sequence[Merge], owner: str
) -> tuple[dict[str, Part], dict[tuple[int, str], str]] | None:
    """The fused parameters that merged tensors make, and `{(expert, projection): checkpoint key}`; None when
    some are made in another way."""
    names: dict[str, dict[int, str]] = {}
    keys: dict[tuple[int, str], str] = {}
    for merge in merges:
        expert = expert_of(merge, owner)
        if expert is None:
            return None
        names.setdefault(merge.targets[0].rpartition(".")[2], {})[merge.position] = expert[1]
        keys[expert] = merge.key
    return {name: Part(tuple(held[i] for i in sorted(held))) for name, held in names.items()}, keys


def by_owner(merges: Sequence[Merge]) -> dict[str, list[Merge]]:
    """Merged tensors by the module that holds what they are merged into."""
    out: dict[str, list[Merge]] = {}
    for merge in merges:
        out.setdefault(merge.targets[0].rpartition(".")[0], []).append(merge)
    return out


def unfuse(
    model: nn.Module, keys: dict[str, str], merges: Sequence[Merge], reader: CheckpointReader
) -> list[str]:
    """Take all fused experts of a model apart, in place.

    Args:
        model: parameters on the meta device.
        keys: `{name in the model: checkpoint key}`; projections are added, fused parameters taken out.
        merges: tensors that transformers would merge.
        reader: gets the views of tensors that the checkpoint itself keeps fused.

    Returns:
        Keys of merged tensors that belong to no experts, or to experts that cannot be taken apart.
    """
    left: list[str] = []
    for owner, merged in by_owner(merges).items():
        if not _from_experts(model, owner, merged, keys):
            left += _from_transposed(merged, keys, model, reader)
    for owner, module in list(model.named_modules()):
        parts = parts_of(module)
        if parts is not None and all(f"{owner}.{name}" in keys for name in parts):
            _from_fused(model, owner, module, parts, keys, reader)
    return left


def _from_experts(model: nn.Module, owner: str, merges: list[Merge], keys: dict[str, str]) -> bool:
    """Experts that the checkpoint keeps apart; False when these tensors are something else."""
    fused = model.get_submodule(owner)
    found = gathered(merges, owner)
    if found is None:
        return False
    parts, stems = found
    layers = empty_layers(fused, parts)
    absent = [f"{n}.{p}" for n, layer in enumerate(layers) for p in layer if (n, p) not in stems]
    if absent or len(stems) != sum(len(layer) for layer in layers):
        raise StructureError(
            f"{owner} has {len(layers)} experts and the checkpoint holds {len(stems)} of their projections"
            + (f"; it lacks {', '.join(absent[:5])}" if absent else "")
        )
    put(model, owner, Experts(fused, parts, layers))
    keys.update({f"{owner}.{n}.{p}.weight": key for (n, p), key in stems.items()})
    return True


def _from_transposed(
    merges: list[Merge], keys: dict[str, str], model: nn.Module, reader: CheckpointReader
) -> list[str]:
    """Tensors that are only transposed while they load are names like any other; the rest is returned."""
    left = []
    state = model.state_dict()
    for merge in merges:
        target = merge.targets[0]
        swapped = all(step == "Transpose" for step, _ in merge.steps) and len(merge.targets) == 1
        shape = reader.tensors[merge.key].shape
        if not swapped or merge.sources != 1 or target not in state or len(shape) != 3:
            left.append(merge.key)
        else:
            keys[target] = merge.key
    return left


def _from_fused(
    model: nn.Module,
    owner: str,
    module: nn.Module,
    parts: Mapping[str, Part],
    keys: dict[str, str],
    reader: CheckpointReader,
) -> None:
    """Experts that the checkpoint keeps fused: each projection becomes a view of a slice."""
    layers = empty_layers(module, parts)
    for name, part in parts.items():
        key = keys.pop(f"{owner}.{name}")
        stored, shape = reader.tensors[key].shape, tuple(module._parameters[name].shape)  # type: ignore[union-attr]
        transposed = part.transposed != (stored != shape)
        if stored not in (shape, (shape[0], shape[2], shape[1])):
            raise StructureError(f"{key} is {stored} where {owner}.{name} wants {shape}")
        bare = key.removesuffix(".weight")
        # Where the checkpoint has a spelling of its own for the fused tensor, the model's names are used.
        stem = bare.removesuffix(f".{name}") if bare.endswith(f".{name}") else owner
        _, rows, columns = part.measures(shape)
        views = {}
        for number in range(len(layers)):
            for projection in part.projections:
                view = f"{stem}.{number}.{projection}.weight"
                keys[f"{owner}.{number}.{projection}.weight"] = view
                views[view] = View(key, number, part.rows(projection, rows), transposed, (rows, columns))
        reader.split(key, views)
    put(model, owner, Experts(module, parts, layers))


def empty_layers(fused: nn.Module, parts: Mapping[str, Part]) -> list[dict[str, nn.Module]]:
    """For each expert its linear layers, without weights."""
    layers: dict[int, dict[str, nn.Module]] = {}
    for name, part in parts.items():
        parameter = fused._parameters[name]
        assert parameter is not None  # parts are parameters that exist
        experts, rows, columns = part.measures(parameter.shape)
        for number in range(experts):
            for projection in part.projections:
                layer = nn.Linear(columns, rows, False, device="meta", dtype=parameter.dtype)
                layer.weight.requires_grad_(False)
                layers.setdefault(number, {})[projection] = layer
    return [layers[number] for number in range(len(layers))]


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the submodule at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)

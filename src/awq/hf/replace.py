"""Put quantized layers into a model that has no weights yet, wherever its checkpoint holds codes.

Layers are chosen by what the checkpoint holds (`*.qweight`), not by a list of exceptions: a layer whose
codes are in the file becomes a `QuantLinear`, experts become `QuantExperts`, anything else stays as it is.
Codes for what is neither are refused: left alone, transformers would initialise it at random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from awq.errors import LoadError
from awq.formats import get_format
from awq.model.names import Merge, match_names
from awq.model.weights import FLOAT_DTYPES, TensorInfo
from awq.nn import QuantExperts, QuantLinear

# The only ways of making a fused parameter of experts that can be undone expert by expert.
_STACKED = (("MergeModulelist", 0),)
_STACKED_IN_ROWS = (("MergeModulelist", 0), ("Concatenate", 1))


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a checkpoint holds, and how.

    Args:
        tensors: by checkpoint key.
        bits, group_size: as its configuration says; -1 for one group per row.
        layout: a name in `awq.formats`.
    """

    tensors: Mapping[str, TensorInfo]
    bits: int = 4
    group_size: int = 128
    layout: str = "gemm"

    def layer(
        self, stem: str, out_features: int, in_features: int, dtype: torch.dtype, bias: bool
    ) -> QuantLinear:
        """The empty layer that the tensors of `stem` fill.

        Raises:
            LoadError: they do not fit it.
        """
        group_size = in_features if self.group_size == -1 else self.group_size
        reason = get_format(self.layout).supports(out_features, in_features, group_size, self.bits)
        shapes = get_format(self.layout).packed_shapes(out_features, in_features, group_size, dtype)
        scales_dtype = dtype
        for suffix, (kind, shape) in shapes.items():
            info = self.tensors.get(f"{stem}.{suffix}")
            if info is None:
                raise LoadError(f"the checkpoint holds codes for {stem} but no {stem}.{suffix}")
            if reason or info.shape != shape:
                raise LoadError(
                    f"{stem}.{suffix} is {info.shape} where the model and groups of {group_size} want "
                    f"{shape}: the checkpoint and config.json disagree" + (f" ({reason})" if reason else "")
                )
            if kind.is_floating_point:
                scales_dtype = FLOAT_DTYPES.get(info.dtype, scales_dtype)
        return QuantLinear(
            in_features,
            out_features,
            group_size,
            self.bits,
            bias,
            dtype=dtype,
            scales_dtype=scales_dtype,
            device="meta",
            layout=self.layout,
        )


def replace_layers(model: nn.Module, stored: Stored) -> list[str]:
    """Put empty quantized layers where the checkpoint holds codes; returns their names.

    Raises:
        LoadError: codes belong to something that is neither a linear layer nor an expert of this model, or do
            not fit it.
    """
    mark = f".{get_format(stored.layout).names[0]}"
    stems = [key.removesuffix(mark) for key in stored.tensors if key.endswith(mark)]
    named, merges = match_names(model, [f"{stem}.weight" for stem in stems])
    replaced = []
    for name, key in named.items():
        path, stem = name.removesuffix(".weight"), key.removesuffix(".weight")
        linear = _linear(model, path, stem)
        layer = stored.layer(
            stem, linear.out_features, linear.in_features, linear.weight.dtype, linear.bias is not None
        )
        _put(model, path, layer)
        replaced.append(path)
    by_owner: dict[str, list[Merge]] = {}
    for merge in merges:
        by_owner.setdefault(merge.targets[0].rpartition(".")[0], []).append(merge)
    for owner, parts in by_owner.items():
        _put(model, owner, _experts(model, owner, parts, stored))
        replaced.append(owner)
    _untie(model, replaced)
    return replaced


def _linear(model: nn.Module, path: str, stem: str) -> nn.Linear:
    try:
        linear = model.get_submodule(path)
    except AttributeError:
        raise LoadError(f"the checkpoint holds codes for {stem}, {_where_it_would_be(model, path)}") from None
    if not isinstance(linear, nn.Linear):
        raise LoadError(f"the checkpoint holds codes for {stem}, which is a {type(linear).__name__} here")
    return linear


def _where_it_would_be(model: nn.Module, path: str) -> str:
    """Why a name does not exist in the model."""
    module, known = model, ""
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            break
        module, known = child, f"{known}.{part}".lstrip(".")
    if any(parameter.dim() == 3 for parameter in module._parameters.values() if parameter is not None):
        return (
            f"but {known} is a {type(module).__name__}, which keeps all experts in one parameter that single "
            "experts' codes cannot be mapped to: this model cannot be loaded from such a checkpoint"
        )
    return "which this model does not have"


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _experts(model: nn.Module, owner: str, merges: list[Merge], stored: Stored) -> QuantExperts:
    """The empty experts that the tensors behind `merges` fill."""
    fused = model.get_submodule(owner)
    parts: dict[str, dict[int, str]] = {}
    stems: dict[tuple[int, str], str] = {}
    for merge in merges:
        number, projection = _expert_of(merge, owner, fused)
        parts.setdefault(merge.targets[0].rpartition(".")[2], {})[merge.position] = projection
        stems[number, projection] = merge.key.removesuffix(".weight")
    layers: dict[int, dict[str, nn.Module]] = {}
    for name, projections in parts.items():
        parameter: Any = getattr(fused, name)
        experts, rows, columns = parameter.shape
        for number in range(experts):
            for projection in projections.values():
                stem = stems.pop((number, projection), None)
                if stem is None:
                    raise LoadError(
                        f"the checkpoint lacks the codes of {owner}.{number}.{projection}: the experts of a "
                        "layer are quantized all or none"
                    )
                layers.setdefault(number, {})[projection] = stored.layer(
                    stem, rows // len(projections), columns, parameter.dtype, bias=False
                )
    if stems:
        extra = next(iter(stems.values()))
        raise LoadError(f"the checkpoint holds codes for {extra}, but {owner} has {len(layers)} experts")
    ordered = {name: [projections[i] for i in sorted(projections)] for name, projections in parts.items()}
    return QuantExperts(fused, ordered, [layers[number] for number in range(len(layers))])


def _expert_of(merge: Merge, owner: str, fused: nn.Module) -> tuple[int, str]:
    """Number and projection behind a merged tensor's name."""
    head, _, projection = merge.renamed.removesuffix(".weight").rpartition(".")
    head, _, number = head.rpartition(".")
    stacked = merge.steps == (_STACKED if merge.sources == 1 else _STACKED_IN_ROWS)
    within = head.rpartition(".")[2] == owner.rpartition(".")[2]
    if not (stacked and within and number.isdigit() and len(merge.targets) == 1):
        raise LoadError(
            f"the codes of {merge.key.removesuffix('.weight')} belong to a {type(fused).__name__}, which is "
            f"made of its checkpoint's tensors in a way that codes cannot follow ({merge.steps}): this model "
            "cannot be loaded from a quantized checkpoint"
        )
    return int(number), projection


def _untie(model: Any, replaced: list[str]) -> None:
    """Forget that a quantized output layer was tied to the embeddings: they have nothing in common now."""
    tied = getattr(model, "all_tied_weights_keys", {})
    heads = {f"{path}.weight" for path in replaced} & (set(tied) | set(tied.values()))
    if not heads:
        return
    for target, source in list(tied.items()):
        if target in heads or source in heads:
            del tied[target]
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False

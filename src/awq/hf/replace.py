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
from awq.formats.detect import Detected
from awq.model.conv1d import as_linear
from awq.model.experts import Part, parts_of
from awq.model.fuse import expert_place
from awq.model.names import Merge, match_names
from awq.model.unfuse import by_owner, expert_of, gathered, put
from awq.model.weights import FLOAT_DTYPES, TensorInfo
from awq.nn import QuantExperts, QuantLinear


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a checkpoint holds, and how.

    Args:
        tensors: by checkpoint key.
        found: what its configuration says.
    """

    tensors: Mapping[str, TensorInfo]
    found: Detected

    @property
    def layout(self) -> str:
        """A name in `awq.formats`."""
        return self.found.layout

    def layer(
        self, stem: str, out_features: int, in_features: int, dtype: torch.dtype, bias: bool
    ) -> QuantLinear:
        """The empty layer that the tensors of `stem` fill.

        Raises:
            LoadError: they do not fit it.
        """
        setting = self.found.setting(stem)
        bits, group_size = setting.bits, setting.size(in_features)
        reason = get_format(self.layout).supports(out_features, in_features, group_size, bits)
        shapes = get_format(self.layout).packed_shapes(out_features, in_features, group_size, dtype, bits)
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
            bits,
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
    apart: dict[str, dict[tuple[int, str], str]] = {}
    for name, key in named.items():
        path, stem = name.removesuffix(".weight"), key.removesuffix(".weight")
        expert = expert_place(model, path)
        if expert is not None:
            owner, number, projection = expert
            apart.setdefault(owner, {})[number, projection] = stem
            continue
        linear = _linear(model, path, stem)
        layer = stored.layer(
            stem, linear.out_features, linear.in_features, linear.weight.dtype, linear.bias is not None
        )
        layer.of_conv1d = as_linear(model.get_submodule(path)) is not None
        put(model, path, layer)
        replaced.append(path)
    for owner, parts in by_owner(merges).items():
        put(model, owner, _experts(model, owner, parts, stored))
        replaced.append(owner)
    for owner, stems_of in apart.items():
        fused_parts = parts_of(model.get_submodule(owner)) or {}
        put(model, owner, _filled(model, owner, fused_parts, stems_of, stored))
        replaced.append(owner)
    untie(model, replaced)
    return replaced


def _linear(model: nn.Module, path: str, stem: str) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise LoadError(f"the checkpoint holds codes for {stem}, {_where_it_would_be(model, path)}") from None
    linear = as_linear(module) or module
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


def _experts(model: nn.Module, owner: str, merges: list[Merge], stored: Stored) -> QuantExperts:
    """The empty experts that the tensors behind `merges` fill."""
    found = gathered(merges, owner)
    if found is None:
        odd = next(merge for merge in merges if expert_of(merge, owner) is None)
        stem = odd.key.removesuffix(".weight")
        raise LoadError(
            f"the codes of {stem} belong to a {type(model.get_submodule(owner)).__name__}, which is made "
            f"of its checkpoint's tensors in a way that codes cannot follow ({odd.steps}): this model "
            "cannot be loaded from a quantized checkpoint"
        )
    parts, keys = found
    stems = {expert: key.removesuffix(".weight") for expert, key in keys.items()}
    return _filled(model, owner, parts, stems, stored)


def _filled(
    model: nn.Module, owner: str, parts: dict[str, Part], stems: dict[tuple[int, str], str], stored: Stored
) -> QuantExperts:
    """Experts whose layers take the tensors of `stems`, `{(expert, projection): name}`."""
    fused = model.get_submodule(owner)
    stems = dict(stems)
    layers: dict[int, dict[str, nn.Module]] = {}
    for name, part in parts.items():
        parameter: Any = getattr(fused, name)
        experts, rows, columns = part.measures(parameter.shape)
        for number in range(experts):
            for projection in part.projections:
                stem = stems.pop((number, projection), None)
                if stem is None:
                    raise LoadError(
                        f"the checkpoint lacks the codes of {owner}.{number}.{projection}: the experts of a "
                        "layer are quantized all or none"
                    )
                layers.setdefault(number, {})[projection] = stored.layer(
                    stem, rows, columns, parameter.dtype, bias=False
                )
    if stems:
        extra = next(iter(stems.values()))
        raise LoadError(f"the checkpoint holds codes for {extra}, but {owner} has {len(layers)} experts")
    return QuantExperts(fused, parts, [layers[number] for number in range(len(layers))])


def untie(model: Any, replaced: list[str]) -> None:
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

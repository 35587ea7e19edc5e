"""A quantized model folder, in whichever known layout: its layers, and the canonical weight of each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq.errors import AwqError, ConfigError, CorruptFileError
from awq.formats import LAYOUTS, LayerShape, Layout, mlx
from awq.formats.detect import Detected, detect, entry_of
from awq.model.weights import FLOAT_DTYPES, CheckpointReader, read_json
from awq.weight import QuantizedWeight

# Where older projects wrote what `config.json` says today.
OLD_CONFIGS = ("quant_config.json", "quantize_config.json")
# The last part of an embedding's name, in every architecture that transformers has.
_EMBEDDING = re.compile(r"(^|\.)(\w*embed(ding|dings|_tokens|_positions)?|wte|wpe|embed_in)$")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A quantized layer on disk: its name, the checkpoint key of each of its tensors by suffix, its
    measures."""

    name: str
    keys: Mapping[str, str]
    shape: LayerShape
    bits: int

    @property
    def scales_key(self) -> str:
        """Checkpoint key of the scales."""
        return self.keys.get("scales") or self.keys["weight_scale"]

    @property
    def is_embedding(self) -> bool:
        """Whether the name is that of an embedding table, which MLX quantizes with the linear layers."""
        return bool(_EMBEDDING.search(self.name))


class QuantizedCheckpoint:
    """A quantized model folder, opened; no weights are read.

    Args:
        folder: a model folder.

    Attributes:
        reader: all tensors.
        config: `config.json` as it stands.
        detected: layout, bits, group size.
        layers: quantized layers by name, in the order of the files.

    Raises:
        MissingFileError, CorruptFileError: the folder is no complete model.
        ConfigError: it is not quantized, or in a way that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.reader = CheckpointReader(folder)
        entry = quantization_entry(folder, self.config)
        if entry is None:
            raise ConfigError(f"{folder} holds no quantized checkpoint; quantize it first")
        suffixes = {key.rpartition(".")[2] for key in self.reader.tensors}
        try:
            self.detected: Detected = detect(entry, suffixes)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from error
        self.layout: Layout = LAYOUTS[self.detected.layout]
        self.layers = {layer.name: layer for layer in self._find_layers()}
        if not self.layers:
            raise CorruptFileError(
                f"{folder} says that it is quantized ({self.detected.layout}) and holds no tensor named "
                f"*.{self.layout.names[0]}"
            )

    def _find_layers(self) -> list[Layer]:
        mark = self.layout.names[0]
        names = [key.removesuffix(f".{mark}") for key in self.reader.tensors if key.endswith(f".{mark}")]
        return [self._layer(name) for name in names]

    def _layer(self, name: str) -> Layer:
        tensors = self.reader.tensors
        keys = {s: f"{name}.{s}" for s in self.layout.names if f"{name}.{s}" in tensors}
        absent = sorted(set(self.layout.names) - set(self.layout.optional) - set(keys))
        if absent:
            raise CorruptFileError(
                f"{self.folder}: {name} lacks {', '.join(absent)}, part of the {self.detected.layout} layout"
            )
        shapes = {suffix: tensors[key].shape for suffix, key in keys.items()}
        if any(len(shape) > 2 for shape in shapes.values()):
            raise ConfigError(
                f"{self.folder}: {name} holds experts stacked in one tensor, which the other layouts keep "
                "apart; start from the original weights instead"
            )
        bits, group_size = self.detected.setting(name)
        try:
            return Layer(name, keys, self.layout.measure(shapes, bits, group_size), bits)
        except CorruptFileError as error:
            raise CorruptFileError(f"{self.folder}: {name}: {error}") from error

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A layer's tensors as they are on disk, by suffix."""
        suffix_of = {key: suffix for suffix, key in self.layers[name].keys.items()}
        return {suffix_of[key]: tensor for key, tensor in self.reader.read(list(suffix_of))}

    def weight(self, name: str) -> QuantizedWeight:
        """The canonical weight of a layer, exactly as it was quantized.

        Raises:
            CorruptFileError: its tensors do not belong together, or hold what has no canonical form.
        """
        layer = self.layers[name]
        try:
            return self.layout.unpack(self.tensors(name), layer.bits, layer.shape.group_size)
        except AwqError as error:
            raise CorruptFileError(f"{name}: {error}") from error

    def values(self, name: str) -> Tensor:
        """The values of a layer, float32 `[out_features, in_features]`.

        MLX's offsets need not be zero points for this.
        """
        if self.layout is mlx:
            return mlx.dequantize(self.tensors(name), self.layers[name].bits)
        return self.weight(name).dequantize()

    @property
    def dtype(self) -> torch.dtype:
        """The model's own dtype: what its configuration says, else that of most of its float tensors."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(named, str) and isinstance(getattr(torch, named, None), torch.dtype):
            return getattr(torch, named)
        counts: dict[str, int] = {}
        for info in self.reader.tensors.values():
            if info.dtype in FLOAT_DTYPES:
                counts[info.dtype] = counts.get(info.dtype, 0) + info.bytes
        return FLOAT_DTYPES[max(counts, key=lambda name: counts[name])]

    def float_linears(self) -> list[str]:
        """Linear layers left float: all that has a matrix for its weight, is used, and is no embedding."""
        found = []
        for key, info in self.reader.tensors.items():
            name, _, leaf = key.rpartition(".")
            matrix = leaf == "weight" and len(info.shape) == 2 and info.dtype in FLOAT_DTYPES
            known = name in self.layers or key in self.reader.unused or _EMBEDDING.search(name)
            if matrix and not known:
                found.append(name)
        return sorted(found)


def quantization_entry(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a folder says about its quantization: in `config.json`, or in an older project's own file."""
    entry = entry_of(config)
    if entry is not None:
        return entry
    for name in OLD_CONFIGS:
        if (folder / name).exists():
            return read_json(folder / name)
    return None

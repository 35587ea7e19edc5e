"""From one layout to another, tensor by tensor: a layer at a time is in memory, and nothing is searched anew.

What cannot be held exactly is refused with the layer's name, and then nothing is left behind. Plain weights
(`fp16`) are the one target that rounds: they hold the values and no longer the codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq.config import Setting
from awq.errors import ConfigError, OutputExistsError
from awq.formats import get_format
from awq.formats.entry import MIXING, NO_CONV1D, entry_for
from awq.formats.layout import exact_scales
from awq.model.conv1d import conv1d_layers
from awq.model.fetch import resolve
from awq.model.fuse import Whole, experts_to_fuse
from awq.model.quantized import OLD_CONFIGS, Layer, QuantizedCheckpoint
from awq.model.weights import FLOAT_DTYPES
from awq.pipeline.finish import INDEXES, cast, copy_files
from awq.pipeline.output import output_folder
from awq.pipeline.preflight import check_disk
from awq.pipeline.writer import (
    DEFAULT_SHARD_BYTES,
    ShardWriter,
    TensorPlan,
    gathered,
    plan_shards,
    tensor_plan,
    write_json,
)

# Layouts that `convert` writes. Plain weights are written by `export`, under the name fp16.
TARGETS = (
    *("gemm", "gemv", "gemv_fast", "llm_awq", "marlin"),
    *("gptq", "gptq_v2", "compressed-tensors", "mlx", "codes"),
)
# Layouts that are only read, and why.
_READ_ONLY = {"exllama": "on disk it is `gemm`"}
_AWQ_LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm_awq", "marlin")
Told = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was done.

    Args:
        source, target: names of layouts.
        layers: how many quantized layers were rewritten.
        bytes: size of the weight files.
        notes: what a person should know.
    """

    source: str
    target: str
    layers: int
    bytes: int
    notes: list[str]


def convert(
    checkpoint: str | Path,
    out: str | Path,
    to: str,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Told | None = None,
) -> Conversion:
    """Rewrite a quantized checkpoint in another layout, with the same codes, scales and zero points.

    Args:
        checkpoint: a folder, or a hub name, in any layout that `awq.formats` reads.
        out: the folder to make.
        to: one of `TARGETS`.
        max_shard_bytes: size of an output file at most.
        overwrite: replace a checkpoint in `out`.
        progress: told the layers done, and how many there are.

    Raises:
        ConfigError: the target is unknown, is the checkpoint's own, or cannot hold a layer, which is named.
        MissingFileError, CorruptFileError: the checkpoint is damaged, or holds what has no exact form.
        OutputError: the output folder cannot be written, or is not empty.
    """
    if to in _READ_ONLY:
        raise ConfigError(f"the {to} layout is not written: {_READ_ONLY[to]}")
    if to not in TARGETS:
        raise ConfigError(f"target {to!r} is unknown; choose one of: {', '.join(TARGETS)}")
    source = QuantizedCheckpoint(resolve(checkpoint))
    if source.detected.layout == to:
        raise ConfigError(f"{source.folder} is in the {to} layout already; copy it instead")
    return _Job(source, to, None, max_shard_bytes, progress).run(Path(out).expanduser(), overwrite)


def write_plain(
    checkpoint: str | Path,
    out: str | Path,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Told | None = None,
) -> Conversion:
    """Write the dequantized model, which any loader takes for a float one.

    Args:
        checkpoint, out, max_shard_bytes, overwrite, progress: as for `convert`.
        dtype: of the weights. A tensor that is float32 in a model which is not (a router's bias) stays so.

    Raises:
        AwqError: as for `convert`.
        WeightError: a value is too large for float16.
    """
    source = QuantizedCheckpoint(resolve(checkpoint))
    return _Job(source, "float", dtype, max_shard_bytes, progress).run(Path(out).expanduser(), overwrite)


class _Job:
    """One conversion: plan every tensor, write them, then the configuration."""

    def __init__(
        self,
        source: QuantizedCheckpoint,
        to: str,
        dtype: torch.dtype | None,
        max_shard_bytes: int,
        progress: Told | None,
    ) -> None:
        self.source, self.to, self.progress = source, to, progress
        # Whether zero points may be left out must be known before they are read.
        self.layout = get_format(to, source.detected.symmetric)
        self.turned = conv1d_layers(source.folder, source.layers)
        if self.turned and to in NO_CONV1D:
            raise ConfigError(
                f"{min(self.turned)} is a Conv1D, which no reader of the {to} layout takes; export to fp16"
            )
        # MLX computes in the scales' dtype, and wants every float tensor in it.
        self.dtype = self._scales_dtype(next(iter(source.layers.values()))) if to == "mlx" else dtype
        kept = [layer for layer in source.layers.values() if to == "float" or not self._dequantized(layer)]
        self.settings = {layer.name: self._setting(layer) for layer in kept}
        self.setting = self._common_setting()
        wholes = experts_to_fuse(source.folder, source.layers) if to == "float" else []
        self.whole_of = {name: whole for whole in wholes for name in whole.members}
        self.symmetric = True  # until a zero point is seen that is not the middle code
        # A tensor that is copied, by its key; a layer, at the place of its first tensor; or many layers, at
        # that of the first.
        self.items: list[str | Layer | Whole] = []
        unused = sorted(source.reader.unused)
        self.shards = plan_shards(self._plan(), max_shard_bytes, unused, "mlx" if to == "mlx" else "pt")

    def run(self, out: Path, overwrite: bool) -> Conversion:
        """Write everything."""
        source = self.source
        if out.resolve() == source.folder.resolve():
            raise OutputExistsError(f"the output folder is the checkpoint's own ({out}); choose another one")
        total = sum(shard.size for shard in self.shards)
        check_disk(out, total)
        with output_folder(out, overwrite) as work:
            writer = ShardWriter(work, self.shards)
            for chunk in gathered(self._tensors()):
                writer.write(chunk)
            writer.publish(work)
            copy_files(source.folder, work, {"config.json", *OLD_CONFIGS, *INDEXES})
            write_json(work / "config.json", self._config())
        return Conversion(source.detected.layout, self.to, len(source.layers), total, self._notes())

    def _plan(self) -> Iterator[TensorPlan]:
        """Every tensor of the result, and whether each layer fits the target."""
        layer_of = {key: layer for layer in self.source.layers.values() for key in layer.keys.values()}
        seen: set[str] = set()
        for key, info in self.source.reader.tensors.items():
            layer = layer_of.get(key)
            if layer is None:
                self.items.append(key)
                dtype = self._copy_dtype(info.dtype)
                plain = TensorPlan(key, info.dtype, info.shape, info.bytes)
                yield tensor_plan(key, dtype, info.shape) if dtype else plain
            elif layer.name in self.whole_of:
                whole = self.whole_of[layer.name]
                if whole.name not in seen:
                    seen.add(whole.name)
                    self.items.append(whole)
                    yield tensor_plan(whole.name, self._scales_dtype(layer), whole.shape)
            elif layer.name not in seen:
                seen.add(layer.name)
                self.items.append(layer)
                yield from self._plan_layer(layer)

    def _plan_layer(self, layer: Layer) -> Iterator[TensorPlan]:
        out, into, group = layer.shape.out_features, layer.shape.in_features, layer.shape.group_size
        if self._dequantized(layer):
            turned = (into, out) if layer.name in self.turned else (out, into)
            yield tensor_plan(f"{layer.name}.weight", self._scales_dtype(layer), turned)
            return
        reason = self.layout.supports(out, into, group, layer.bits)
        if reason:
            raise ConfigError(f"{layer.name} does not fit the {self.to} layout: {reason}")
        shapes = self.layout.packed_shapes(out, into, group, self._scales_dtype(layer), layer.bits)
        for suffix, (dtype, shape) in shapes.items():
            yield tensor_plan(f"{layer.name}.{suffix}", dtype, shape)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the result, in the order of the plan."""
        done, count = 0, len(self.source.layers)
        for item in self.items:
            if isinstance(item, str):
                tensor = self.source.reader.read_one(item)
                dtype = self._copy_dtype(self.source.reader.tensors[item].dtype)
                yield item, cast(tensor, dtype, item) if dtype else tensor
                continue
            if isinstance(item, Whole):
                yield item.name, self._joined(item)
                done += len(item.members)
            else:
                for suffix, tensor in self._packed(item).items():
                    yield f"{item.name}.{suffix}", tensor
                done += 1
            if self.progress:
                self.progress(done, count)

    def _joined(self, whole: Whole) -> Tensor:
        """The plain weights of all experts of a layer, in one tensor."""
        first = self.source.layers[next(iter(whole.members))]
        out = torch.empty(whole.shape, dtype=self._scales_dtype(first))
        for name, view in whole.members.items():
            view.place(out, self._packed(self.source.layers[name])["weight"])
        return out

    def _packed(self, layer: Layer) -> dict[str, Tensor]:
        dtype = self._scales_dtype(layer)
        if self._dequantized(layer):
            values = self.source.values(layer.name)
            values = values.t().contiguous() if layer.name in self.turned else values
            return {"weight": cast(values, dtype, layer.name)}
        weight = self.source.weight(layer.name)
        self.symmetric = self.symmetric and weight.symmetric
        try:
            return self.layout.pack(dataclasses.replace(weight, scales=exact_scales(weight.scales, dtype)))
        except ConfigError as error:
            raise ConfigError(f"{layer.name} does not fit the {self.to} layout: {error}") from error

    def _dequantized(self, layer: Layer) -> bool:
        """Whether a layer becomes a plain weight: all do in the plain layout; embeddings, which only MLX
        quantizes, do in any other."""
        return self.to == "float" or (self.source.detected.layout == "mlx" and layer.is_embedding)

    def _scales_dtype(self, layer: Layer) -> torch.dtype:
        """Dtype of a layer's scales in the result, or of its plain weight."""
        if self.to == "float" and self.dtype is not None:
            return self.dtype
        stored = FLOAT_DTYPES[self.source.reader.tensors[layer.scales_key].dtype]
        if self.to == "mlx":
            return stored
        return torch.float16 if stored == torch.float32 else stored

    def _copy_dtype(self, stored: str) -> torch.dtype | None:
        """Dtype that a tensor outside the quantized layers is cast to; None to copy its bytes."""
        if self.dtype is None or stored not in FLOAT_DTYPES:
            return None
        kept = self.to == "float" and stored == "F32" and self.source.dtype != torch.float32
        return None if kept else self.dtype

    def _setting(self, layer: Layer) -> Setting:
        """What the configuration says about a layer."""
        whole_rows = self.source.detected.setting(layer.name).group_size == -1
        return Setting(layer.bits, -1 if whole_rows and self.to != "mlx" else layer.shape.group_size)

    def _common_setting(self) -> Setting:
        """The one that the configuration names first: that of most weights."""
        weights: dict[Setting, int] = {}
        for name, setting in self.settings.items():
            shape = self.source.layers[name].shape
            weights[setting] = weights.get(setting, 0) + shape.out_features * shape.in_features
        if len(weights) > 1 and self.to != "float" and self.to not in MIXING:
            found = ", ".join(f"{bits} bits in groups of {size}" for bits, size in sorted(weights))
            raise ConfigError(
                f"{self.source.folder} has layers of several kinds ({found}), and the {self.to} layout's "
                f"configuration names one; {', '.join(MIXING)} name several"
            )
        return max(weights, key=lambda setting: weights[setting])

    def _config(self) -> dict[str, Any]:
        source = self.source
        head = next((name for name in source.layers if name.endswith("lm_head")), None)
        skipped = list(source.detected.skipped)
        both_awq = source.detected.layout in _AWQ_LAYOUTS and self.to in _AWQ_LAYOUTS
        if not (both_awq and skipped):
            skipped = source.float_linears()
        value = _without_quantization(source.config)
        if isinstance(value.get("text_config"), dict):
            value["text_config"] = _without_quantization(value["text_config"])
        if self.dtype is not None:
            value.pop("torch_dtype", None)
            value["dtype"] = str(self.dtype).removeprefix("torch.")
        symmetric = self.symmetric and (self.to != "compressed-tensors" or source.detected.symmetric)
        entry = entry_for(self.to, *self.setting, skipped, head is not None, symmetric, self.settings)
        return value | entry

    def _notes(self) -> list[str]:
        notes = []
        plain = [layer.name for layer in self.source.layers.values() if self._dequantized(layer)]
        if plain and self.to != "float":
            notes.append(f"{', '.join(plain)}: quantized embeddings were written as plain weights")
        casts = {info.dtype for info in self.source.reader.tensors.values()} & set(FLOAT_DTYPES)
        if self.to == "mlx" and {FLOAT_DTYPES[name] for name in casts} != {self.dtype}:
            name = str(self.dtype).removeprefix("torch.")
            notes.append(f"float tensors were cast to {name}, the dtype of the scales, as MLX wants")
        return notes


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("quantization_config", "quantization")}

"""A GGUF file for llama.cpp: the codes go straight into Q4_1 blocks, everything else keeps its values.

Architectures are a table, with the one thing that differs: llama.cpp rotates neighbouring channels of a head
where transformers rotates the two halves, so for the `llama` architecture the rows of q and k are reordered.
Hyperparameters come from transformers' own configuration object, which reads every older spelling.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq.errors import AwqError, ConfigError, MissingDependencyError, OutputExistsError, StructureError
from awq.formats import gguf as blocks
from awq.model.fetch import resolve
from awq.model.quantized import Layer, QuantizedCheckpoint
from awq.model.weights import FLOAT_DTYPES, TensorInfo
from awq.pipeline.convert import Conversion, Told
from awq.pipeline.gguf_tokenizer import add_tokenizer
from awq.pipeline.preflight import check_disk
from awq.pipeline.writer import disk_errors
from awq.weight import QuantizedWeight

# transformers' model type: llama.cpp's architecture, and whether the rows of q and k are reordered.
_ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
# Computed by llama.cpp itself.
_DERIVED = ("rotary_emb.inv_freq",)


def write_gguf(
    checkpoint: str | Path, out: str | Path, *, overwrite: bool = False, progress: Told | None = None
) -> Conversion:
    """Write a quantized checkpoint as a GGUF file; see `awq.export`.

    Args:
        checkpoint: a folder, or a hub name.
        out: a file ending in `.gguf`, or a folder, where it will be `model.gguf`.
        overwrite: replace the file.
        progress: told the layers done, and how many there are.

    Raises:
        ConfigError: an architecture, a tokenizer or a layer that cannot be expressed; named.
        MissingDependencyError: the gguf package is not installed.
        OutputError: the file cannot be written, or exists.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            "writing GGUF needs the gguf package: pip install 'openawq[gguf]'"
        ) from error
    source = QuantizedCheckpoint(resolve(checkpoint))
    path = Path(out).expanduser()
    path = path if path.suffix == ".gguf" else path / "model.gguf"
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another name, or overwrite it on purpose")
    job = _Job(gguf, source, progress)
    temporary = path.with_name(f".{path.name}.unfinished")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    check_disk(path, sum(part.nbytes for part in job.parts))
    try:
        with disk_errors(path):
            job.write(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Conversion(source.detected.layout, "gguf Q4_1", len(source.layers), path.stat().st_size, job.notes)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A tensor of the file: its name there, its ggml type, shape, bytes, and what it is made from.

    `source` is a quantized layer, a checkpoint key, or a tensor that was computed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    source: Layer | str | Tensor


class _Job:
    """One export: plan every tensor, write the metadata, then the tensors one by one."""

    def __init__(self, package: Any, source: QuantizedCheckpoint, progress: Told | None) -> None:
        self.package, self.source, self.progress = package, source, progress
        self.notes: list[str] = []
        self.config = _text_config(source.folder)
        kind = self.config.model_type
        if kind not in _ARCHITECTURES:
            raise ConfigError(
                f"{source.folder} is a {kind} model; GGUF export knows {', '.join(_ARCHITECTURES)}. Export "
                "fp16, and use llama.cpp's own converter"
            )
        self.architecture, self.reordered = _ARCHITECTURES[kind]
        if getattr(self.config, "hidden_act", "silu") != "silu":
            raise ConfigError(f"llama.cpp's {self.architecture} computes silu, not {self.config.hidden_act}")
        self.rope = _rope(self.config)
        self.heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads,
        }
        self.head_dim = (
            getattr(self.config, "head_dim", None)
            or self.config.hidden_size // self.config.num_attention_heads
        )
        self.parts = list(self._plan())

    def write(self, path: Path) -> None:
        """Write the whole file."""
        import numpy as np

        types = self.package.GGMLQuantizationType
        writer = self.package.GGUFWriter(path, self.architecture)
        try:
            self._metadata(writer)
            add_tokenizer(self.package, writer, self.source.folder, self.config.vocab_size)
            for part in self.parts:
                # Bytes, so that types which numpy lacks pass through.
                row = part.nbytes // math.prod(part.shape[:-1])
                shape, kind = (*part.shape[:-1], row), types[part.kind]
                writer.add_tensor_info(part.name, shape, np.dtype("uint8"), part.nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for part in self.parts:
                writer.write_tensor_data(self._bytes(part).numpy())
                done += isinstance(part.source, Layer)
                if self.progress and isinstance(part.source, Layer):
                    self.progress(done, len(self.source.layers))
        finally:
            writer.close()

    def _plan(self) -> Iterator[_Part]:
        architectures = {name: key for key, name in self.package.MODEL_ARCH_NAMES.items()}
        names = self.package.get_tensor_name_map(
            architectures[self.architecture], self.config.num_hidden_layers
        )
        layer_of = {key: layer for layer in self.source.layers.values() for key in layer.keys.values()}
        seen: set[str] = set()
        for key, info in self.source.reader.tensors.items():
            layer = layer_of.get(key)
            if key.endswith(_DERIVED) or (layer is not None and layer.name in seen):
                continue
            name = names.get_name(f"{layer.name}.weight" if layer else key, try_suffixes=(".weight", ".bias"))
            if name is None:
                if key not in self.source.reader.unused:
                    raise ConfigError(f"llama.cpp's {self.architecture} has no place for {key}")
                self.notes.append(f"{key} was left out: llama.cpp has no place for it")
            elif layer is None:
                yield self._plain_part(name, key, info)
            else:
                seen.add(layer.name)
                yield self._layer_part(name, layer)
        if self.rope.factors is not None:
            factors = self.rope.factors
            yield _Part("rope_freqs.weight", "F32", tuple(factors.shape), factors.nbytes, factors)

    def _plain_part(self, name: str, key: str, info: TensorInfo) -> _Part:
        if info.dtype not in FLOAT_DTYPES:
            raise ConfigError(f"{key} is stored as {info.dtype}, which has no form in a GGUF file")
        # Vectors are float32 to llama.cpp; matrices keep their dtype and so their values.
        kind = "F32" if len(info.shape) == 1 else info.dtype
        count = math.prod(info.shape)
        return _Part(name, kind, info.shape, count * (4 if kind == "F32" else 2), key)

    def _layer_part(self, name: str, layer: Layer) -> _Part:
        rows, columns = layer.shape.out_features, layer.shape.in_features
        if layer.is_embedding:
            return _Part(name, "F16", (rows, columns), rows * columns * 2, layer)
        reason = blocks.supports(rows, columns, layer.shape.group_size, layer.bits)
        if reason:
            raise ConfigError(f"{layer.name} has no form in GGUF: {reason}")
        size = rows * columns // blocks.BLOCK * blocks.BLOCK_BYTES
        return _Part(name, "Q4_1", (rows, columns), size, layer)

    def _bytes(self, part: _Part) -> Tensor:
        """A part's tensor as bytes, rows of llama.cpp's q and k in its own order."""
        if isinstance(part.source, Layer):
            name = part.source.name
            if part.kind == "Q4_1":
                weight = self.source.weight(name)
                order = self._row_order(name)
                if order is not None:
                    weight = QuantizedWeight(weight.codes[order], weight.scales[order], weight.zeros[order])
                try:
                    return blocks.pack(weight)
                except AwqError as error:
                    raise ConfigError(f"{name} has no form in GGUF: {error}") from error
            tensor = self.source.values(name).half()
        elif isinstance(part.source, str):
            tensor = self.source.reader.read_one(part.source)
            order = self._row_order(part.source.rpartition(".")[0])
            tensor = tensor if order is None else tensor[order]
            tensor = tensor.float() if part.kind == "F32" else tensor
        else:
            tensor = part.source
        rows = math.prod(part.shape[:-1])
        return tensor.contiguous().view(-1).view(torch.uint8).view(*part.shape[:-1], part.nbytes // rows)

    def _row_order(self, name: str) -> Tensor | None:
        """Where llama.cpp's rows come from: (half, channel) of each head become (channel, half)."""
        heads = self.heads.get(name.rpartition(".")[2])
        if not self.reordered or heads is None:
            return None
        return torch.arange(heads * self.head_dim).view(heads, 2, -1).transpose(1, 2).flatten()

    def _metadata(self, writer: Any) -> None:
        config, rope = self.config, self.rope
        writer.add_name(self.source.folder.name)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(self.heads["k_proj"])
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(rope.base)
        if rope.linear_factor is not None:
            writer.add_rope_scaling_type(self.package.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope.linear_factor)
        writer.add_file_type(self.package.LlamaFileType.MOSTLY_Q4_1)
        writer.add_quantization_version(self.package.GGML_QUANT_VERSION)
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True):
            self.notes.append(
                f"llama.cpp attends to the whole context, the model to its last {window} tokens"
            )


@dataclasses.dataclass(frozen=True)
class _Rope:
    """Rotary positions: the base, a factor of all positions, or float32 divisors `[head_dim / 2]`."""

    base: float
    linear_factor: float | None = None
    factors: Tensor | None = None


def _rope(config: Any) -> _Rope:
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    base = float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return _Rope(base)
    if kind == "linear":
        return _Rope(base, linear_factor=float(parameters["factor"]))
    if kind == "llama3":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return _Rope(base, factors=llama3_factors(parameters, base, head_dim))
    raise ConfigError(f"rope type {kind!r} is not known to the GGUF export; default, linear and llama3 are")


def llama3_factors(parameters: dict[str, Any], base: float, head_dim: int) -> Tensor:
    """What Llama 3.1's scaling divides each frequency by, float32 `[head_dim / 2]`.

    High frequencies stay, low ones are divided by `factor`, those between are blended.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = float(parameters["original_max_position_embeddings"]) * frequency / (2 * math.pi)
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - blend) / float(parameters["factor"]) + blend)).float()


def _text_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder).get_text_config()
    except (ValueError, KeyError, OSError) as error:
        raise StructureError(f"transformers cannot read the configuration in {folder}: {error}") from error

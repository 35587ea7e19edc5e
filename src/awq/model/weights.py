"""Lazy reads from a checkpoint on disk: one tensor at a time, from one safetensors file or many.

A file is opened for each group of reads and closed again. The library maps files into memory, and mapped
pages count as resident until they are unmapped: an open map of the whole model would break the promise that
memory is bounded by one block.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from awq.errors import CorruptFileError, MissingFileError, WeightError

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Metadata entry of our files: names of tensors carried over although the model class does not use them.
UNUSED_KEY = "openawq.unused"
# What JSON of the wrong shape raises when it is read as a header, beside the library's own refusal.
_NO_SENSE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError, SafetensorError)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in a checkpoint: its file, safetensors dtype name, shape, and where its bytes lie."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.begin


@dataclasses.dataclass(frozen=True)
class View:
    """A slice of a tensor that holds all experts of a layer.

    Args:
        source: the tensor `[experts, rows, columns]`.
        expert: which one.
        rows: its output channels.
        transposed: the tensor is `[experts, columns, rows]`.
        shape: of the slice, `(rows, columns)`.
    """

    source: str
    expert: int
    rows: slice
    transposed: bool
    shape: tuple[int, int]

    def cut(self, handle: Any) -> Tensor:
        """The slice, out of an open safetensors file."""
        tensor = handle.get_slice(self.source)
        # The library's slices have no steps; interleaved rows are picked afterwards.
        plain = self.rows if self.rows.step is None else slice(None)
        cut = tensor[self.expert, :, plain].t() if self.transposed else tensor[self.expert, plain, :]
        return cut if self.rows.step is None else cut[self.rows]

    def place(self, whole: Tensor, part: Tensor) -> None:
        """Put the slice into the tensor it came from."""
        target = whole[self.expert].t() if self.transposed else whole[self.expert]
        target[self.rows] = part


class CheckpointReader:
    """The tensors of a model folder.

    Args:
        folder: a Hugging Face model folder with `model.safetensors` or an index and its shards.

    Attributes:
        tensors: by name.
        unused: names that our own files mark as carried over without use (MTP heads and the like).
        views: tensors that are slices of others, see `split`.
        split_up: what `split` took out of `tensors`.

    Raises:
        MissingFileError: the folder, its weights or a shard named in its index is missing.
        CorruptFileError: a file is no safetensors file, is truncated, or lacks a tensor its index names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self.unused: set[str] = set()
        self.views: dict[str, View] = {}
        self.split_up: dict[str, TensorInfo] = {}
        for file in self.files:
            tensors, metadata = read_header(folder / file)
            self.tensors.update(tensors)
            self.unused.update(filter(None, metadata.get(UNUSED_KEY, "").split("\n")))
        self._check_index()

    def _check_index(self) -> None:
        index = self.folder / "model.safetensors.index.json"
        if not index.exists() or len(self.files) == 1:
            return
        absent = sorted(set(read_json(index)["weight_map"]) - set(self.tensors))
        if absent:
            raise CorruptFileError(f"{index} names tensors that no shard holds: {', '.join(absent[:10])}")

    def split(self, key: str, views: dict[str, View]) -> None:
        """Let a tensor appear as slices of it, under names of their own."""
        info = self.split_up[key] = self.tensors.pop(key)
        for name, view in views.items():
            size = info.bytes * math.prod(view.shape) // math.prod(info.shape)
            self.tensors[name] = TensorInfo(info.file, info.dtype, view.shape, 0, size)
        self.views.update(views)

    def fused(self, quantized: Collection[str]) -> dict[str, TensorInfo]:
        """Split tensors of which no slice is among `quantized`: they go to disk as they came."""
        gone = {self.views[name].source for name in quantized if name in self.views}
        return {key: info for key, info in self.split_up.items() if key not in gone}

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield `(key, tensor)` on the CPU in the stored dtype, each file opened once, then unmapped."""
        by_file: dict[str, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.tensors[key].file, []).append(key)
        for file, names in by_file.items():
            try:
                with safe_open(self.folder / file, framework="pt") as handle:
                    for name in names:
                        # A copy: the original is a view of the map, and would keep it alive.
                        view = self.views.get(name)
                        tensor = handle.get_tensor(name) if view is None else view.cut(handle)
                        yield name, tensor.clone(memory_format=torch.contiguous_format)
            except (SafetensorError, OSError) as error:
                raise CorruptFileError(f"cannot read {self.folder / file}: {error}") from error

    def read_one(self, key: str) -> Tensor:
        """One tensor on the CPU, in its stored dtype."""
        return next(tensor for _, tensor in self.read([key]))

    def check_finite(self) -> None:
        """Read every float tensor once and look for NaN and infinity, before any work is lost.

        Raises:
            WeightError: naming the first tensors that hold one.
        """
        bad = []
        for key, info in self.tensors.items():
            if info.dtype in FLOAT_DTYPES and info.bytes:
                low, high = torch.aminmax(self.read_one(key))
                if not (torch.isfinite(low) and torch.isfinite(high)):
                    bad.append(key)
        if bad:
            raise WeightError(
                f"{len(bad)} tensors of {self.folder} hold NaN or infinity ({', '.join(bad[:5])}); the file "
                "is damaged, or the model's training diverged: fetch it again"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        MissingFileError: there is no such file.
        CorruptFileError: it does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} does not exist") from error
    except (ValueError, RecursionError, OSError) as error:
        raise CorruptFileError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} holds no JSON object")
    return value


def _weight_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single.name]
    if index.exists():
        mapping = read_json(index).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
            raise CorruptFileError(f"{index} has no `weight_map` of file names")
        if not mapping:
            raise CorruptFileError(f"{index} names no files")
        files = sorted(set(mapping.values()))
        absent = [file for file in files if not (folder / file).exists()]
        if absent:
            raise MissingFileError(f"{folder} lacks {', '.join(absent)}, which its index names")
        return files
    if any((folder / name).exists() for name in _PICKLES):
        raise MissingFileError(
            f"{folder} holds pickled weights only, which can run code when opened; convert them once with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise MissingFileError(f"{folder} holds no model.safetensors and no model.safetensors.index.json")


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors a safetensors file holds, and its metadata, with the file's length checked against both.

    Raises:
        CorruptFileError: the file is truncated, or no safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > size - 8:
                raise CorruptFileError(f"{path} is truncated: {size} bytes do not hold its header")
            header = json.loads(handle.read(length))
        metadata = header.pop("__metadata__", None) or {}
        start = 8 + length
        out = {
            name: TensorInfo(
                path.name,
                entry["dtype"],
                tuple(entry["shape"]),
                start + entry["data_offsets"][0],
                start + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
        expected = max((info.end for info in out.values()), default=start)
        if size < expected:
            raise CorruptFileError(
                f"{path} is truncated: {size} bytes where its header speaks of {expected}; fetch it again"
            )
        with safe_open(path, framework="pt"):
            pass  # the library checks the rest: dtypes, and shapes and places against one another
    except _NO_SENSE as error:
        raise CorruptFileError(f"{path} is no safetensors file: {error}") from error
    return out, metadata

"""Safetensors files laid out in advance and filled tensor by tensor.

The size of every result is known before work starts, so each shard's header is written first and its file
allocated whole: a full disk shows at once, no tensor waits in memory for its shard, and writing a block again
after a kill gives the same bytes in the same place. safetensors' own writer needs a whole shard in memory.

A file keeps its working name until every tensor is in it; nothing half-written looks whole.

Layout (safetensors): u64 length of the header, JSON header padded with spaces to a multiple of 8, then the
tensors. As the library does, tensors are ordered by element size, widest first, which keeps all aligned.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from awq.errors import DiskFullError, OutputError
from awq.model.weights import UNUSED_KEY

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Size of a weight file at most, where nobody says otherwise.
DEFAULT_SHARD_BYTES = 5 * 10**9
# Bytes of tensors written together: each write ends with a flush to the disk.
_TOGETHER = 1 << 27
# Widths of elements above 8 bits, by which tensors are ordered.
_BITS = {"C64": 64, "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32} | dict.fromkeys(
    ("F16", "BF16", "I16", "U16"), 16
)


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: name, safetensors dtype name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """A file to be written: its final name, its header, and where each tensor's bytes go."""

    name: str
    header: bytes
    places: dict[str, tuple[int, int]]
    size: int


def tensor_plan(name: str, dtype: torch.dtype, shape: Sequence[int]) -> TensorPlan:
    """Plan a tensor of a torch dtype."""
    count = 1
    for extent in shape:
        count *= extent
    return TensorPlan(name, DTYPE_NAMES[dtype], tuple(shape), count * dtype.itemsize)


def plan_shards(
    tensors: Iterable[TensorPlan], max_bytes: int, unused: Sequence[str] = (), framework: str = "pt"
) -> list[ShardPlan]:
    """Distribute tensors, in order, over files of at most `max_bytes` (a larger one stands alone).

    Args:
        tensors: what is to be written.
        max_bytes: of a file.
        unused: tensors that the model class does not use and that are carried over all the same; noted in
            each file's metadata, so that a loader can tell them from a checkpoint that does not fit.
        framework: whose tensors they are, for the metadata: `pt` or `mlx`.
    """
    metadata = {"format": framework} | ({UNUSED_KEY: "\n".join(unused)} if unused else {})
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    count = len(shards)
    return [_lay_out(_shard_name(i, count), members, metadata) for i, members in enumerate(shards)]


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _lay_out(name: str, tensors: list[TensorPlan], metadata: dict[str, str]) -> ShardPlan:
    entries: dict[str, object] = {"__metadata__": metadata}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for tensor in sorted(tensors, key=lambda t: (-_BITS.get(t.dtype, 8), t.name)):
        begin, end = end, end + tensor.bytes
        offsets[tensor.name] = (begin, end)
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    base = len(header)
    return ShardPlan(name, header, {n: (base + b, base + e) for n, (b, e) in offsets.items()}, base + end)


class ShardWriter:
    """Fills planned shards inside a working folder, then moves them to their final place.

    Args:
        work: the working folder.
        shards: what `plan_shards` returned.
        complete: every tensor is in its file already, and files may have been published.

    Raises:
        DiskFullError: the disk cannot hold the files; nothing but them is lost.
    """

    def __init__(self, work: Path, shards: list[ShardPlan], complete: bool = False) -> None:
        self._work = work
        self._shards = shards
        self._shard_of = {name: shard for shard in shards for name in shard.places}
        for shard in () if complete else shards:
            self._allocate(shard)

    def _allocate(self, shard: ShardPlan) -> None:
        path = self._work / shard.name
        if path.exists() and path.stat().st_size == shard.size:
            return  # an interrupted run's; what is missing in it will be written again
        with disk_errors(path), path.open("wb") as handle:
            # The header goes first: a file of full length has it, whenever the process may be killed.
            handle.write(shard.header)
            handle.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, shard.size)
            else:
                handle.truncate(shard.size)

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put tensors in their places and flush them to the disk.

        Raises:
            OutputError: a tensor was not planned, or does not have the planned size.
        """
        touched: dict[str, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors:
            shard = self._shard_of.get(name)
            if shard is None:
                raise OutputError(f"{name} was not planned")
            touched.setdefault(shard.name, []).append((name, tensor))
        for shard_name, members in touched.items():
            path = self._work / shard_name
            with disk_errors(path), path.open("r+b") as handle:
                for name, tensor in members:
                    self._put(handle.fileno(), name, tensor)
                os.fsync(handle.fileno())

    def _put(self, descriptor: int, name: str, tensor: Tensor) -> None:
        begin, end = self._shard_of[name].places[name]
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if raw.nbytes != end - begin:
            raise OutputError(f"{name} has {raw.nbytes} bytes where {end - begin} were planned")
        os.lseek(descriptor, begin, os.SEEK_SET)
        view = raw.data
        while view:
            view = view[os.write(descriptor, view) :]

    def publish(self, out: Path) -> None:
        """Move the finished shards to `out` and write the index if there are several. May be repeated."""
        for shard in self._shards:
            if (self._work / shard.name).exists():
                os.replace(self._work / shard.name, out / shard.name)
        if len(self._shards) > 1:
            total = sum(end - begin for shard in self._shards for begin, end in shard.places.values())
            weight_map = {name: shard.name for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(out / "model.safetensors.index.json", index)


def gathered(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Tensors in lists that are worth a write, of a bounded size."""
    part: list[tuple[str, Tensor]] = []
    held = 0
    for name, tensor in tensors:
        part.append((name, tensor))
        held += tensor.nbytes
        if held >= _TOGETHER:
            yield part
            part, held = [], 0
    if part:
        yield part


def write_json(path: Path, value: object) -> None:
    """Write JSON by way of a temporary file, so that the file is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with temporary.open("w", encoding="utf-8") as handle:
            json.dump(value, handle, indent=2, ensure_ascii=False)
            handle.write("\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into ours.

    Raises:
        DiskFullError: no space, or over quota.
        OutputError: any other refusal.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        code, reason = _reason(error)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"no room for {path}: {reason}; free some space and run the same command again: "
                "it continues where it was"
            ) from error
        raise OutputError(f"cannot write {path}: {reason}") from error


def _reason(error: Exception) -> tuple[int | None, str]:
    """The system's number and words; safetensors tells the number in its own error's text only."""
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    found = re.search(r"os error (\d+)", str(error))
    return (int(found[1]), os.strerror(int(found[1]))) if found else (None, str(error))

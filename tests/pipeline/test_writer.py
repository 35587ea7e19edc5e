"""Files laid out in advance: readable by safetensors whatever is put in, and never whole before they are."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from awq.errors import CorruptFileError, DiskFullError, OutputError
from awq.model import CheckpointReader
from awq.model.weights import UNUSED_KEY
from awq.pipeline.writer import (
    DTYPE_NAMES,
    ShardWriter,
    TensorPlan,
    disk_errors,
    plan_shards,
    tensor_plan,
    write_json,
)

# Dtypes that we never make ourselves and carry over as they are.
CARRIED = {"U16": torch.uint16, "F8_E4M3": torch.float8_e4m3fn, "C64": torch.complex64, "U64": torch.uint64}
NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    octets = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    octets = octets % 2 if dtype == torch.bool else octets
    return octets.view(dtype).reshape(shape)


def raw(tensor: Tensor) -> bytes:
    """The bytes: NaNs do not compare."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def plan_of(name: str, tensor: Tensor) -> TensorPlan:
    if tensor.dtype in DTYPE_NAMES:
        return tensor_plan(name, tensor.dtype, tensor.shape)
    (label,) = (label for label, dtype in CARRIED.items() if dtype == tensor.dtype)
    return TensorPlan(name, label, tuple(tensor.shape), tensor.nbytes)


tensors = st.dictionaries(
    NAMES,
    st.builds(
        random_tensor,
        st.sampled_from([*DTYPE_NAMES, *CARRIED.values()]),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100)
@given(given_tensors=tensors, max_bytes=st.integers(1, 400), seed=st.randoms(use_true_random=False))
def test_whatever_is_written_is_read_back_by_safetensors_and_by_ourselves(
    given_tensors: dict[str, Tensor], max_bytes: int, seed: Any
) -> None:
    shards = plan_shards([plan_of(name, t) for name, t in given_tensors.items()], max_bytes)
    with tempfile.TemporaryDirectory() as folder:
        work, out = Path(folder, "work"), Path(folder, "out")
        work.mkdir()
        out.mkdir()
        writer = ShardWriter(work, shards)
        items = list(given_tensors.items())
        seed.shuffle(items)  # in whatever order blocks are done
        for item in items:
            writer.write([item])
        writer.publish(out)
        assert not list(work.iterdir())
        files = sorted(out.glob("*.safetensors"))
        assert [file.name for file in files] == sorted(shard.name for shard in shards)
        back: dict[str, Tensor] = {}
        for file in files:
            back |= load_file(file)
        assert set(back) == set(given_tensors)
        for name, tensor in given_tensors.items():
            assert back[name].dtype == tensor.dtype
            assert back[name].shape == tensor.shape
            assert raw(back[name]) == raw(tensor)
        reader = CheckpointReader(out)
        assert {name: info.shape for name, info in reader.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in given_tensors.items()
        }


@given(given_tensors=tensors, max_bytes=st.integers(1, 400))
def test_shards_keep_their_limit_and_their_order(given_tensors: dict[str, Tensor], max_bytes: int) -> None:
    plans = [plan_of(name, tensor) for name, tensor in given_tensors.items()]
    shards = plan_shards(plans, max_bytes)
    size_of = {plan.name: plan.bytes for plan in plans}
    place = {name: i for i, shard in enumerate(shards) for name in shard.places}
    assert [place[plan.name] for plan in plans] == sorted(place.values())
    for i, shard in enumerate(shards):
        total = sum(size_of[name] for name in shard.places)
        assert total <= max_bytes or len([n for n in shard.places if size_of[n]]) == 1
        if i + 1 < len(shards):
            (following, *_) = (plan for plan in plans if place[plan.name] == i + 1)
            assert total + following.bytes > max_bytes


@given(given_tensors=tensors)
def test_every_tensor_lies_at_a_multiple_of_its_element_size(given_tensors: dict[str, Tensor]) -> None:
    (shard,) = plan_shards([plan_of(name, t) for name, t in given_tensors.items()], 10**9)
    for name, (begin, end) in shard.places.items():
        assert end - begin == given_tensors[name].nbytes
        assert begin % given_tensors[name].dtype.itemsize == 0


def test_names_of_tensors_the_model_does_not_use_go_along(tmp_path: Path) -> None:
    (shard,) = plan_shards([tensor_plan("a", torch.int8, (1,))], 100, unused=["mtp.head", "odd name"])
    ShardWriter(tmp_path, [shard]).publish(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt", UNUSED_KEY: "mtp.head\nodd name"}
    assert CheckpointReader(tmp_path).unused == {"mtp.head", "odd name"}


def test_an_index_names_the_file_of_each_tensor(tmp_path: Path) -> None:
    plans = [tensor_plan(name, torch.float16, (4,)) for name in "bac"]
    shards = plan_shards(plans, 16)
    (tmp_path / "work").mkdir()
    writer = ShardWriter(tmp_path / "work", shards)
    writer.publish(tmp_path)
    writer.publish(tmp_path)  # again, as after a kill
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 24},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    }


def test_strided_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    (shard,) = plan_shards([tensor_plan("a", torch.float32, (3, 2))], 100)
    writer = ShardWriter(tmp_path, [shard])
    value = torch.arange(6.0).view(2, 3).t()
    writer.write([("a", value)])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], value)


def test_what_was_not_planned_is_not_written(tmp_path: Path) -> None:
    (shard,) = plan_shards([tensor_plan("a", torch.float32, (3,))], 100)
    writer = ShardWriter(tmp_path, [shard])
    with pytest.raises(OutputError, match="b was not planned"):
        writer.write([("b", torch.ones(3))])
    with pytest.raises(OutputError, match="a has 8 bytes where 12 were planned"):
        writer.write([("a", torch.ones(2))])


def two_shards() -> list[Any]:
    return plan_shards([tensor_plan("a", torch.uint8, (1000,)), tensor_plan("b", torch.uint8, (1000,))], 1000)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_while_files_are_laid_out_leaves_none_that_looks_whole(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.posix_fallocate

    def refuse_the_second(descriptor: int, offset: int, length: int) -> None:
        if len(list(tmp_path.iterdir())) > 1:
            raise OSError(code, os.strerror(code))
        real(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", refuse_the_second)
    with pytest.raises(DiskFullError, match=r"no room for .*model-00002.*run the same command again"):
        ShardWriter(tmp_path, two_shards())
    with pytest.raises(CorruptFileError):
        open_alone(tmp_path / "model-00002-of-00002.safetensors")
    monkeypatch.undo()
    writer = ShardWriter(tmp_path, two_shards())
    writer.write([("a", torch.ones(1000, dtype=torch.uint8)), ("b", torch.ones(1000, dtype=torch.uint8))])
    for file in tmp_path.glob("*.safetensors"):
        assert all(bool(tensor.all()) for tensor in load_file(file).values())


def open_alone(file: Path) -> None:
    from awq.model.weights import read_header

    read_header(file)


def test_space_is_taken_when_files_are_laid_out(tmp_path: Path) -> None:
    """A sparse file would find the disk full when it is too late."""
    (shard,) = plan_shards([tensor_plan("a", torch.uint8, (1 << 20,))], 1 << 30)
    ShardWriter(tmp_path, [shard])
    status = (tmp_path / "model.safetensors").stat()
    assert status.st_size == shard.size
    assert status.st_blocks * 512 >= 1 << 20


def test_files_of_a_killed_run_are_kept_and_half_made_ones_made_anew(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, two_shards())
    writer.write([("a", torch.full((1000,), 7, dtype=torch.uint8))])
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"half")
    writer = ShardWriter(tmp_path, two_shards())
    assert bool((load_file(tmp_path / "model-00001-of-00002.safetensors")["a"] == 7).all())
    assert load_file(tmp_path / "model-00002-of-00002.safetensors")["b"].shape == (1000,)


def test_refusals_of_the_system_become_ours(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write it: Permission denied"), disk_errors(Path("it")):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(OutputError, match="cannot write"):
        write_json(tmp_path / "no" / "folder.json", {})


def test_json_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    write_json(path, {"name": "Gutenbérg"})
    assert json.loads(path.read_text("utf-8")) == {"name": "Gutenbérg"}
    assert "Gutenbérg" in path.read_text("utf-8")

"""A finished checkpoint on its way to the user's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from awq.errors import DiskFullError, OutputError, OutputExistsError
from awq.pipeline import publish
from awq.pipeline.report import write_json
from awq.pipeline.writer import ShardWriter

WHOLE = 10**9


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """Four tensors of 4 KB in one file, as a run leaves them."""
    folder = tmp_path / "result"
    folder.mkdir()
    tensors = {f"layer.{i}.weight": torch.full((32, 32), float(i)) for i in range(4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "openawq.unused": "layer.3.weight"})
    write_json(folder / "config.json", {"quantization_config": {"quant_method": "awq"}})
    write_json(folder / "awq_report.json", {})
    write_json(folder / "tokenizer.json", {})
    return folder


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_files_are_cut_to_the_size_and_indexed(result: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(result, out, 2 * 4096)
    assert shards(out) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    before = load_file(result / "model.safetensors")
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], before.pop(name))
    assert not before and index["metadata"]["total_size"] == 4 * 4096
    assert not (out / ".awq-saving").exists()


def test_marks_of_unused_tensors_are_kept(result: Path, tmp_path: Path) -> None:
    from awq.model.weights import CheckpointReader

    publish(result, tmp_path / "out", 4096)
    assert CheckpointReader(tmp_path / "out").unused == {"layer.3.weight"}


def test_an_earlier_save_is_replaced_whole(result: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(result, out, 4096)
    (out / "notes.txt").write_text("mine")
    (out / "adapter.safetensors").write_bytes(b"mine too")
    publish(result, out, WHOLE)
    assert shards(out) == ["adapter.safetensors", "model.safetensors"]
    assert not (out / "model.safetensors.index.json").exists()
    assert (out / "notes.txt").read_text() == "mine"
    publish(result, out, 4096)
    assert "model.safetensors" not in shards(out)


def test_a_folder_can_be_cut_anew_in_place(result: Path) -> None:
    before = load_file(result / "model.safetensors")
    publish(result, result, 4096)
    after = {name: tensor for file in shards(result) for name, tensor in load_file(result / file).items()}
    assert len(shards(result)) == 4 and after.keys() == before.keys()
    assert (result / "tokenizer.json").exists() and (result / "config.json").exists()


def test_weights_are_moved_when_that_is_allowed(result: Path, tmp_path: Path) -> None:
    publish(result, tmp_path / "copy", WHOLE)
    assert shards(result) == ["model.safetensors"]
    publish(result, tmp_path / "moved", WHOLE, move=True)
    assert shards(result) == [] and shards(tmp_path / "moved") == ["model.safetensors"]


def test_a_float_model_is_not_replaced(result: Path, tmp_path: Path, books6m: Path) -> None:
    out = tmp_path / "original"
    shutil.copytree(books6m, out)
    with pytest.raises(OutputExistsError, match="another model"):
        publish(result, out, WHOLE)
    assert not (out / ".awq-saving").exists()


def test_a_file_in_the_way_is_an_error_of_ours(result: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        publish(result, tmp_path / "out", WHOLE)


def test_a_full_disk_leaves_the_earlier_save_as_it_was(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    publish(result, out, WHOLE)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*args: Any) -> None:
        raise DiskFullError("no room")

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(DiskFullError):
        publish(result, out, 4096)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    publish(result, out, 4096)
    assert len(shards(out)) == 4 and not (out / ".awq-saving").exists()

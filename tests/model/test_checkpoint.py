"""Reading model folders: lazily, completely, or with an error that says what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from awq.errors import (
    AlreadyQuantizedError,
    CorruptFileError,
    MissingFileError,
    StructureError,
    WeightError,
)
from awq.model import CheckpointReader, dry_pass, find_blocks, open_model, place
from awq.model.fetch import resolve


@pytest.fixture
def model(books6m: Path, tmp_path: Path) -> Path:
    """A copy of the shipped model that may be damaged."""
    return Path(shutil.copytree(books6m, tmp_path / "model"))


def shard(folder: Path) -> None:
    """Turn a single-file checkpoint into three shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        part = {name: tensors[name] for name in names[i::3]}
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_hold_the_same_tensors_as_one_file(model: Path, books6m: Path) -> None:
    shard(model)
    single, sharded = CheckpointReader(books6m), CheckpointReader(model)
    assert set(single.tensors) == set(sharded.tensors)
    ours = dict(sharded.read(list(sharded.tensors)))
    assert all(torch.equal(tensor, ours[key]) for key, tensor in single.read(list(single.tensors)))


def test_a_truncated_file_is_named(model: Path) -> None:
    file = model / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1000)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is truncated"):
        CheckpointReader(model)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, (20).to_bytes(8, "little") + b"not json at all....."]
)
def test_files_that_are_no_safetensors_are_named(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        CheckpointReader(model)


def test_missing_files_are_named(model: Path, tmp_path: Path) -> None:
    shard(model)
    (model / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingFileError, match="model-00002-of-00003"):
        CheckpointReader(model)
    (model / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"config\.json"):
        open_model(model)
    with pytest.raises(MissingFileError, match="no-such-folder"):
        resolve(tmp_path / "no-such-folder")


def test_pickles_are_refused_with_the_cure(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(MissingFileError, match="save_pretrained"):
        CheckpointReader(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_found_before_any_work(model: Path, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(WeightError, match=r"model\.layers\.3\.mlp\.up_proj\.weight"):
        CheckpointReader(model).check_finite()


def test_a_missing_weight_and_a_wrong_shape_are_named(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    lost = tensors.pop("model.layers.2.self_attn.q_proj.weight")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CorruptFileError, match=r"layers\.2\.self_attn\.q_proj"):
        open_model(model)
    tensors["model.layers.2.self_attn.q_proj.weight"] = lost[:128].clone()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CorruptFileError, match="disagree"):
        open_model(model)


def test_a_quantized_model_is_not_quantized_again(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(AlreadyQuantizedError, match="awq"):
        open_model(model)


def test_an_unknown_architecture_is_an_error_of_ours(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "no_such_model"
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(StructureError, match="no_such_model"):
        open_model(model)


def test_opening_reads_no_weights(books6m: Path) -> None:
    skeleton = open_model(books6m)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gemma3_text", {"head_dim": 16, "num_key_value_heads": 2, "sliding_window": 8}),
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
        ("bloom", {"n_head": 4, "n_layer": 2}),
        ("falcon", {"alibi": True}),
        ("gpt_neox", {}),
    ],
)
@torch.no_grad()
def test_blocks_run_one_by_one_give_the_models_hidden_states(
    family: str, changes: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    """Masks and rotary embeddings are each block's own, padding included; tuples and tensors both work."""
    model = tiny(family, **changes)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(20) < torch.tensor([20, 14, 5])[:, None]
    expected = model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    skeleton = open_model(tmp_path)
    name, blocks = find_blocks(skeleton.model)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    (item,) = dry_pass(skeleton, name, [inputs], torch.device("cpu"))
    hidden = item.hidden
    torch.testing.assert_close(hidden[mask], expected[0][mask], rtol=1e-4, atol=1e-5)
    for index, block in enumerate(blocks):
        skeleton.load(block, f"{name}.{index}", torch.device("cpu"))
        hidden = item.calls[index].run(block, hidden)
        skeleton.unload(block)
        if index + 1 < len(blocks):  # the last entry of hidden_states is behind the final norm
            torch.testing.assert_close(hidden[mask], expected[index + 1][mask], rtol=1e-3, atol=1e-4)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_placing_keeps_shared_tensors_shared_and_nesting_whole() -> None:
    tensor = torch.ones(2)
    value = {"a": [tensor, (tensor, None)], "b": "text", "c": {"d": tensor}}
    moved = place(value, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][0] is moved["a"][1][0] is moved["c"]["d"]
    assert moved["b"] == "text"
    assert moved["a"][1][1] is None

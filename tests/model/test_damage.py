"""Damaged and strange model folders: each named for what it is, none a crash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from awq.errors import (
    AlreadyQuantizedError,
    ConfigError,
    CorruptFileError,
    MissingFileError,
    StructureError,
)
from awq.model import CheckpointReader, open_model, pick_device
from awq.model.fetch import resolve
from awq.model.weights import read_header


@pytest.fixture
def model(tiny: Any, tmp_path: Path) -> Path:
    """A tiny model that may be damaged."""
    tiny("llama", num_key_value_heads=2).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        with_header([]),
        with_header("text"),
        with_header({"a": 3}),
        with_header({"a": {}}),
        with_header({"a": ENTRY | {"shape": "2"}}, bytes(8)),
        with_header({"a": ENTRY | {"data_offsets": [0]}}, bytes(8)),
        with_header({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)),
        with_header({"a": ENTRY | {"data_offsets": [-8, 0]}}, bytes(8)),
        with_header({"a": ENTRY | {"data_offsets": ["0", "8"]}}, bytes(8)),
        with_header({"a": ENTRY | {"shape": [3]}}, bytes(8)),
        with_header({"a": ENTRY | {"dtype": 7}}, bytes(8)),
        with_header({"__metadata__": [], "a": ENTRY}, bytes(8)),
        with_header({"a": ENTRY}, bytes(7)),
        with_header({"a": ENTRY}, bytes(9)),
        b"\x00" * 8,
        (2**63).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"\xff\xff\xff\xff",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_headers_that_make_no_sense_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        CheckpointReader(tmp_path)


@given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_one_wrong_byte_in_a_header_is_no_crash(
    place: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("byte")
    file = folder / "model.safetensors"
    save_file({"first": torch.ones(3, 2), "second": torch.ones(4, dtype=torch.float16)}, file)
    content = bytearray(file.read_bytes())
    content[place % len(content)] = value
    file.write_bytes(content)
    try:
        reader = CheckpointReader(folder)
        dict(reader.read(list(reader.tensors)))
    except CorruptFileError as error:
        assert "model.safetensors" in str(error)


def test_a_good_header_is_read_whatever_it_holds(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(1.0), "none": torch.zeros(0, 3), "wide": torch.ones(2, 3).bfloat16()}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    found, metadata = read_header(tmp_path / "a.safetensors")
    assert {name: (info.dtype, info.shape, info.bytes) for name, info in found.items()} == {
        "scalar": ("F32", (), 4),
        "none": ("F32", (0, 3), 0),
        "wide": ("BF16", (2, 3), 12),
    }
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "index", ["nonsense", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}']
)
def test_an_index_that_makes_no_sense_is_named(index: str, model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises((CorruptFileError, MissingFileError), match=r"index\.json"):
        CheckpointReader(model)


def test_a_truncated_shard_is_named(tiny: Any, tmp_path: Path) -> None:
    tiny("llama", num_key_value_heads=2).save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match=f"{shard.name} is truncated.*fetch it again"):
        open_model(tmp_path)


@pytest.mark.parametrize("value", [None, {}])
def test_a_configuration_that_speaks_of_no_quantization_is_none(value: Any, model: Path) -> None:
    change_config(model, quantization_config=value)
    open_model(model)


@pytest.mark.parametrize(
    ("value", "method"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"bits": 4}, "some method"), ("x", "x")],
)
def test_a_quantized_model_is_named_with_its_method(value: Any, method: str, model: Path) -> None:
    change_config(model, quantization_config=value)
    with pytest.raises(AlreadyQuantizedError, match=f"quantized already.*{method}"):
        open_model(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"hidden_act": "no_such_function"},
        {"model_type": None},
        {"model_type": 7},
        {"model_type": "t5"},
        {"rope_parameters": {"rope_type": "no_such_rope"}},
        {"vocab_size": -1},
    ],
)
def test_a_configuration_that_no_model_can_be_made_of_is_an_error_of_ours(
    changes: dict[str, Any], model: Path
) -> None:
    change_config(model, **changes)
    with pytest.raises(StructureError, match="cannot build the model"):
        open_model(model)


def test_weights_in_a_dtype_that_is_no_float_are_refused_before_any_work(
    model: Path, tmp_path: Path, token_lists: Any
) -> None:
    from awq import QuantConfig
    from awq.pipeline import quantize

    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float64)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(StructureError, match=rf"{name} is stored as F64; convert"):
        quantize(model, tmp_path / "out", QuantConfig(group_size=32), token_lists)
    assert not (tmp_path / "out").exists()


def test_code_that_comes_with_a_model_is_not_run_unasked(model: Path) -> None:
    (model / "evil.py").write_text("raise SystemExit('it ran')")
    change_config(
        model, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    )
    with pytest.raises(StructureError, match="trust_remote_code"):
        open_model(model)


@pytest.mark.parametrize("error", [ConnectionError("no route\nto it"), ValueError(), OSError()])
def test_a_hub_that_cannot_be_reached_is_an_error_of_ours(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(MissingFileError, match="owner/name is no folder here, and fetching it") as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)


def test_hub_models_are_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name", "v2") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", "v2")

    def wanted(file: str) -> bool:
        return any(fnmatch.fnmatch(file, pattern) for pattern in asked["allow_patterns"])

    needed = (
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
    )
    assert all(map(wanted, needed))
    assert not any(map(wanted, ("pytorch_model.bin", "model.gguf", "consolidated.00.pth", "rust_model.ot")))


@pytest.mark.parametrize("name", ["no-such-folder", "./no/such", "/no/such", "a/b/c", ""])
def test_names_that_can_be_no_hub_model_are_not_looked_for(name: str, tmp_path: Path) -> None:
    if not name:
        with pytest.raises(MissingFileError):
            open_model(resolve(tmp_path / name))
        return
    with pytest.raises(MissingFileError, match="neither a folder nor the name of a model"):
        resolve(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "", "cpu:cpu"])
def test_devices_that_cannot_compute_here_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"device '.*' cannot be used here .*try `auto` or `cpu`"):
        pick_device(name)


def test_a_copy_of_the_shipped_model_opens_from_anywhere(books6m: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(books6m, tmp_path / "ünïcode [x] folder")
    assert open_model(Path(folder)).vocabulary == 4096

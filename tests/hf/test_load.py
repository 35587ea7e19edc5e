"""Loading a checkpoint: whole, or an error that names the tensor. Nothing is ever made up at random."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from awq import QuantConfig
from awq.errors import ConfigError, CorruptFileError, LoadError, MissingFileError
from awq.hf import is_awq, load_quantized, register, unregister
from awq.nn import QuantLinear
from awq.pipeline import quantize

IDS = [[5, 6, 7, 8, 9, 10, 11, 12], [40, 50, 60]]
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoint(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in groups of 32; tests leave it as it is."""
    place = tmp_path_factory.mktemp("checkpoint")
    tiny("llama", num_key_value_heads=2).save_pretrained(place / "in")
    quantize(place / "in", place / "out", QuantConfig(group_size=32, method="rtn"), IDS)
    return place / "out"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_entry(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_every_layer_with_codes_is_quantized_and_no_other(checkpoint: Path) -> None:
    model = load_quantized(checkpoint)
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    tensors = load_file(checkpoint / "model.safetensors")
    assert quantized == {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert len(quantized) == 14
    assert not model.training
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_of_activations_is_served_and_changes_no_code(dtype: torch.dtype, checkpoint: Path) -> None:
    model = load_quantized(checkpoint, dtype=dtype)
    assert model.dtype == dtype
    assert model(torch.tensor([IDS[0]])).logits.dtype == dtype
    state, tensors = model.state_dict(), load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] in ("qweight", "qzeros", "scales"):
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(
    "name",
    [
        f"{QUERY}.qweight",
        f"{QUERY}.qzeros",
        f"{QUERY}.scales",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
class TestEachTensor:
    def test_missing_is_named(self, name: str, copy: Path) -> None:
        change_tensors(copy, lambda tensors: tensors.__delitem__(name))
        with pytest.raises(LoadError, match=name.rpartition(".")[0]):
            load_quantized(copy)

    def test_of_another_shape_is_named(self, name: str, copy: Path) -> None:
        def grow(tensors: dict[str, Tensor]) -> None:
            tensors[name] = torch.cat([tensors[name], tensors[name]])

        change_tensors(copy, grow)
        with pytest.raises(LoadError, match=name.rpartition(".")[0]):
            load_quantized(copy)

    def test_transposed_is_named(self, name: str, copy: Path) -> None:
        def turn(tensors: dict[str, Tensor]) -> None:
            before = tensors[name]
            tensors[name] = before.t().contiguous() if before.dim() == 2 else before[None]
            assert tensors[name].shape != before.shape, "this would be no other shape"

        change_tensors(copy, turn)
        with pytest.raises(LoadError, match=name.rpartition(".")[0]):
            load_quantized(copy)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("model.layers.0.mlp.extra.weight", (4, 4), torch.float16),
        ("model.layers.7.self_attn.q_proj.qweight", (64, 8), torch.int32),
        ("model.embed_tokens.qweight", (64, 16), torch.int32),
        (f"{QUERY}.bias", (64,), torch.float16),
        (f"{QUERY}.weight", (64, 64), torch.float16),
        ("mtp.head.weight", (2, 2), torch.float16),
    ],
)
def test_a_tensor_too_many_is_named(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, copy: Path
) -> None:
    change_tensors(copy, lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)}))
    with pytest.raises(LoadError, match=name.removesuffix(".qweight")):
        load_quantized(copy)


def test_several_missing_tensors_are_told_together(copy: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"], tensors["model.norm.weight"]

    change_tensors(copy, change)
    with pytest.raises(LoadError, match=r"2 missing: lm_head\.weight, model\.norm\.weight"):
        load_quantized(copy)


def test_codes_that_were_not_written_by_the_model_in_config_json_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(LoadError, match=r"missing: .*model\.layers\.2\."):
        load_quantized(copy)
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(LoadError, match=r"model\.layers\.1\."):
        load_quantized(copy)


def test_damaged_files_are_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    os.truncate(file, len(content) - 100)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is truncated"):
        load_quantized(copy)
    file.write_bytes(content[:8] + b"?" + content[9:])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is no safetensors file"):
        load_quantized(copy)
    file.unlink()
    with pytest.raises(MissingFileError, match=r"no model\.safetensors"):
        load_quantized(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"config\.json is not readable JSON"):
        load_quantized(copy)
    (copy / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"config\.json does not exist"):
        load_quantized(copy)
    with pytest.raises(MissingFileError, match="neither a folder nor the name"):
        load_quantized(copy / "no" / "such")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"bits": 3}, ConfigError),
        ({"version": "no_such_layout"}, ConfigError),
        ({"zero_point": False}, ConfigError),
        ({"quant_method": "gptq"}, ConfigError),
    ],
)
def test_entries_that_speak_of_something_else_are_refused(
    changes: dict[str, Any], error: type[Exception], copy: Path
) -> None:
    change_entry(copy, **changes)
    with pytest.raises(error):
        load_quantized(copy)


@pytest.mark.parametrize("entry", [None, {}, "awq", []])
def test_a_model_that_is_not_quantized_is_no_checkpoint(entry: Any, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    assert not is_awq(copy)
    with pytest.raises(ConfigError, match="holds no AWQ checkpoint"):
        load_quantized(copy)


def test_a_kernel_can_be_insisted_on(checkpoint: Path) -> None:
    model = load_quantized(checkpoint, kernel="torch")
    assert "kernel=torch" in repr(model)
    assert "kernel=cpu-" not in repr(model)
    with pytest.raises(ConfigError, match="kernel 'warp' is unknown; known are"):
        load_quantized(checkpoint, kernel="warp")


def test_kernels_agree_on_the_logits(checkpoint: Path) -> None:
    ids = torch.tensor([IDS[0]])
    fast, exact = (load_quantized(checkpoint, dtype=torch.float32, kernel=k) for k in (None, "torch"))
    with torch.no_grad():
        fast, exact = fast(ids).logits, exact(ids).logits
    assert float((fast - exact).norm() / exact.norm()) < 0.02


def test_transformers_loads_checkpoints_once_registered(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    register()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(model.get_submodule(QUERY), QuantLinear)
    ids = torch.tensor([IDS[0]])
    with torch.no_grad():
        expected = load_quantized(checkpoint)(ids).logits
        assert torch.equal(model(ids).logits, expected)
    out = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 11)


def test_registering_twice_and_unregistering_gives_transformers_its_own_class_back() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    unregister()
    stock = AUTO_QUANTIZER_MAPPING["awq"]
    assert stock.__module__.startswith("transformers.")
    try:
        register()
        register()
        assert AUTO_QUANTIZER_MAPPING["awq"].__module__.startswith("awq.")
    finally:
        unregister()
    assert AUTO_QUANTIZER_MAPPING["awq"] is stock
    unregister()
    assert AUTO_QUANTIZER_MAPPING["awq"] is stock
    register()


def test_saving_what_was_loaded_gives_the_same_tensors(checkpoint: Path, tmp_path: Path) -> None:
    model = load_quantized(checkpoint)
    model(torch.tensor([IDS[0]]))
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "again"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    with torch.no_grad():
        ids = torch.tensor([IDS[0]])
        assert torch.equal(load_quantized(tmp_path / "again")(ids).logits, model(ids).logits)


def test_rows_of_a_padded_batch_are_what_they_are_alone(checkpoint: Path) -> None:
    model = load_quantized(checkpoint, dtype=torch.float32, kernel="torch")
    short, long = IDS[1], IDS[0]
    gap = len(long) - len(short)
    ids = torch.tensor([long, [0] * gap + short])
    mask = torch.tensor([[1] * len(long), [0] * gap + [1] * len(short)])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, alone in zip(together, (long, short), strict=True):
        expected = model.generate(torch.tensor([alone]), **options)[0]
        assert row[-4:].tolist() == expected[-4:].tolist()

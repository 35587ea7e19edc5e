"""GPT-2 keeps its linear layers transposed: every way in and out of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from awq import QuantConfig, convert, export, load_quantized, quantize
from awq.errors import ConfigError, CorruptFileError
from zoo import TEXT, build


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its `attn.c_proj` is square: only the values tell which way it lies."""
    folder = tmp_path_factory.mktemp("gpt2")
    build(TEXT["gpt2"], folder)
    return folder


@pytest.fixture(scope="module")
def quantized(original: Path, token_lists: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpt2-awq") / "awq"
    quantize(original, out, QuantConfig(group_size=32), token_lists, device="cpu")
    return out


@torch.no_grad()
def logits(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    entry = json.loads((folder / "config.json").read_text())
    if "quantization_config" in entry:
        return of(load_quantized(folder, dtype=torch.float32, kernel="torch"))
    return of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@torch.no_grad()
def of(model: Any) -> Any:
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(5))
    return model(ids).logits


def test_codes_lie_as_those_of_a_linear_layer_do(original: Path, quantized: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    assert tensors["transformer.h.0.mlp.c_fc.qweight"].shape == (64, 128 // 8)
    floats = load_file(original / "model.safetensors")
    assert floats["transformer.h.0.mlp.c_fc.weight"].shape == (64, 128)


def test_a_plain_export_is_a_float_model_with_the_same_values(quantized: Path, tmp_path: Path) -> None:
    export(quantized, tmp_path / "fp16", "fp16")
    assert torch.allclose(logits(tmp_path / "fp16"), logits(quantized), atol=0.05)


def test_dequantizing_in_memory_saves_a_float_model(quantized: Path, tmp_path: Path) -> None:
    model = load_quantized(quantized, dtype=torch.float32, kernel="torch")
    before = of(model)
    model.dequantize().save_pretrained(tmp_path)
    assert torch.allclose(logits(tmp_path), before, atol=1e-5)


@pytest.mark.parametrize("format", ["float", "folded"])
def test_plain_formats_keep_the_orientation(
    format: Any, original: Path, token_lists: list[list[int]], tmp_path: Path
) -> None:
    """At 8 bits what comes out is nearly what went in, unless a matrix lies the wrong way."""
    config = QuantConfig(group_size=32, format=format, bits=8)
    quantize(original, tmp_path / "out", config, token_lists, device="cpu")
    before = logits(original)
    assert float((logits(tmp_path / "out") - before).abs().max() / before.abs().max()) < 0.03


def test_names_without_the_prefix_of_the_model_are_understood(
    original: Path, quantized: Path, token_lists: list[list[int]], tmp_path: Path
) -> None:
    """The hub's own GPT-2 has such names, and masks among its weights."""
    shutil.copytree(original, tmp_path / "bare")
    tensors = load_file(original / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(bare, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    config = QuantConfig(group_size=32)
    quantize(tmp_path / "bare", tmp_path / "out", config, token_lists, device="cpu")
    assert "h.1.attn.c_proj.qweight" in load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(logits(tmp_path / "out"), logits(quantized))
    export(tmp_path / "out", tmp_path / "fp16", "fp16")
    assert torch.allclose(logits(tmp_path / "fp16"), logits(quantized), atol=0.05)


def test_layouts_whose_readers_would_turn_the_codes_are_refused(quantized: Path, tmp_path: Path) -> None:
    for target in ("mlx", "compressed-tensors"):
        with pytest.raises(ConfigError, match="Conv1D"):
            convert(quantized, tmp_path / target, target)
    convert(quantized, tmp_path / "gemv", "gemv")
    assert torch.equal(logits(tmp_path / "gemv"), logits(quantized))


def test_a_misshapen_weight_is_refused_in_the_orientation_of_the_file(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "wrong")
    tensors = load_file(original / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].t().contiguous()
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"c_fc.weight is \(128, 64\), the model wants \(64, 128\)"):
        quantize(tmp_path / "wrong", tmp_path / "out", QuantConfig(group_size=32), [[5] * 8], device="cpu")

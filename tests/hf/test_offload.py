"""Layers whose codes lie on disk until they are needed. Without a GPU, "cpu" is the device that computes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AwqConfig

import awq
from awq.errors import ConfigError
from awq.nn import QuantLinear
from rounded import prompt, quantized_pair, relative, same_files

HALF_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
}
FAMILIES = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
}


def quant_linears(model: Any) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def load(folder: Path, work: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=AwqConfig(backend="torch"),
        offload_folder=work / "offload",
        **options,
    )


def bytes_held(model: Any) -> int:
    """Memory that a model's quantized layers hold, whichever way."""
    total = 0
    for module in quant_linears(model):
        tensors = [t for t in (*module.buffers(), *(module._state or ())) if isinstance(t, torch.Tensor)]
        total += sum(t.numel() * t.element_size() for t in tensors if not t.is_meta)
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device_map", [HALF_ON_DISK, "auto"], ids=["half on disk", "auto"])
@torch.no_grad()
def test_offloaded_layers_compute_the_same_keep_nothing_and_are_saved_whole(
    family: str, device_map: Any, tiny: Any, tmp_path: Path
) -> None:
    model = tiny(family, **FAMILIES[family]).to(torch.bfloat16)
    folder, _ = quantized_pair(model, tmp_path, scales_dtype=torch.bfloat16)
    whole = load(folder, tmp_path)
    # Too little memory for the model: transformers puts what does not fit on disk.
    limit = {"max_memory": {"cpu": 30_000}} if device_map == "auto" else {}
    offloaded = load(folder, tmp_path, device_map=device_map, offload_buffers=True, **limit)
    away = [module for module in quant_linears(offloaded) if module.is_offloaded]
    assert away
    assert (len(away) < len(quant_linears(offloaded))) == (device_map == HALF_ON_DISK)
    before = bytes_held(offloaded)
    assert before < bytes_held(whole)
    for _ in range(2):
        assert relative(offloaded(prompt()).logits, whole(prompt()).logits) < 1e-6
        assert all(module.is_away for module in away)
        assert bytes_held(offloaded) == before
    whole.save_pretrained(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        offloaded.save_pretrained(tmp_path / "offloaded")
    same_files(tmp_path / "whole", tmp_path / "offloaded")


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> Path:
    return quantized_pair(tiny("llama", num_key_value_heads=2), tmp_path)[0]


@torch.no_grad()
def test_without_offload_buffers_the_result_is_right_and_a_warning_says_what_it_costs(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="pass offload_buffers=True"):
        model = load(checkpoint, tmp_path, device_map=HALF_ON_DISK)
    assert relative(model(prompt()).logits, load(checkpoint, tmp_path)(prompt()).logits) < 1e-6


@torch.no_grad()
def test_our_own_loader_offloads_buffers_by_itself(checkpoint: Path, tmp_path: Path) -> None:
    model = awq.load_quantized(checkpoint, device_map=HALF_ON_DISK, offload_folder=tmp_path / "offload")
    assert any(module.is_offloaded for module in quant_linears(model))
    assert model(prompt()).logits.isfinite().all()


def test_an_offloaded_model_is_not_dequantized_into_memory(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint, tmp_path, device_map=HALF_ON_DISK, offload_buffers=True)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\..* is offloaded"):
        model.dequantize()


def test_an_offloaded_layer_tells_its_weights_shape_without_loading_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = load(checkpoint, tmp_path, device_map=HALF_ON_DISK, offload_buffers=True)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.is_meta
    assert weight.shape == (128, 64)

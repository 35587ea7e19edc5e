"""`model.dequantize()`: transformers' own hook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from awq.nn import QuantLinear
from rounded import prompt, quantized_pair, relative, same_files


@pytest.fixture
def pair(tiny: Any, tmp_path: Path) -> tuple[Path, Path]:
    return quantized_pair(tiny("llama", num_key_value_heads=2, attention_bias=True), tmp_path)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def test_a_dequantized_model_is_an_ordinary_float_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = load(pair[0], dtype=torch.float32)
    back = model.dequantize()
    assert not any(isinstance(module, QuantLinear) for module in back.modules())
    expected = load(pair[1], dtype=torch.float32)(prompt()).logits
    assert relative(back(prompt()).logits, expected) < 1e-6
    back.save_pretrained(tmp_path / "back")
    same_files(pair[1], tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    assert relative(load(tmp_path / "back", dtype=torch.float32)(prompt()).logits, expected) < 1e-6


@pytest.mark.parametrize("given", [None, torch.float16])
def test_the_dtype_is_the_models_unless_another_is_asked_for(
    given: torch.dtype | None, pair: tuple[Path, Path]
) -> None:
    back = load(pair[0], dtype=torch.bfloat16).dequantize(given)
    assert back.model.layers[0].mlp.up_proj.weight.dtype == (given or torch.bfloat16)
    assert back.model.layers[0].self_attn.q_proj.bias.dtype == (given or torch.bfloat16)


def test_a_model_can_be_dequantized_after_it_was_saved(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Saving spells the dtype out in the configuration, where dequantizing reads it."""
    model = load(pair[0], dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    assert model.dequantize().model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_a_dequantized_model_can_be_trained(pair: tuple[Path, Path]) -> None:
    back = load(pair[0], dtype=torch.float32).dequantize().train().requires_grad_()
    back(prompt(), labels=prompt()).loss.backward()
    assert back.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0

"""Vision-language checkpoints through transformers' own classes, with the plug-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import awq
from awq.hf import load_float, load_quantized
from awq.nn import QuantLinear
from rounded import relative
from zoo.vision import BUILDERS, image_inputs


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "gemma3", "smolvlm"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An architecture, and a quantized checkpoint of it."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = BUILDERS[name](folder / "model")
    config = awq.QuantConfig(group_size=32, method="rtn")
    awq.quantize(model, folder / "out", config, [[5, 6, 7, 8] * 9])
    return name, folder / "out"


@torch.no_grad()
def test_the_auto_class_for_images_loads_it_whole(pair: tuple[str, Path]) -> None:
    name, folder = pair
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    layers = [path for path, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 14 and not any("vis" in path for path in layers)
    ours = load_quantized(folder, dtype=torch.float32)
    assert type(ours) is type(model)
    inputs = image_inputs(name)
    assert relative(model(**inputs).logits, ours(**inputs).logits) < 1e-6


def test_it_answers_about_an_image(pair: tuple[str, Path]) -> None:
    name, folder = pair
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    inputs = image_inputs(name)
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    answer = model.generate(**inputs, **options)
    assert answer.shape == (1, inputs["input_ids"].shape[1] + 4)
    plain = load_quantized(folder, dtype=torch.float32, kernel="torch")
    assert torch.equal(answer, plain.generate(**inputs, **options))


def test_the_facade_loads_the_same_class(pair: tuple[str, Path]) -> None:
    _, folder = pair
    model = awq.AutoAWQForCausalLM.from_quantized(folder, device_map="cpu")
    assert type(model.model) is AutoModelForImageTextToText._model_mapping[type(model.config)]


def test_a_float_model_is_loaded_whole(tmp_path: Path) -> None:
    folder = BUILDERS["qwen2_vl"](tmp_path)
    assert type(load_float(folder)).__name__ == "Qwen2VLForConditionalGeneration"
    model = awq.AutoAWQForCausalLM.from_pretrained(folder)
    assert type(model.model).__name__ == "Qwen2VLForConditionalGeneration"

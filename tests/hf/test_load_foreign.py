"""Codes in other projects' formats, loaded for use as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import awq
from awq import QuantConfig
from awq.errors import ConfigError


@pytest.fixture
def gemm(tiny: Any, token_lists: Any, tmp_path: Path) -> Path:
    """A tiny Llama in the default layout."""
    tiny("llama", num_key_value_heads=2).to(torch.float16).save_pretrained(tmp_path / "float")
    awq.quantize(tmp_path / "float", tmp_path / "gemm", QuantConfig(group_size=32, method="rtn"), token_lists)
    return tmp_path / "gemm"


@pytest.mark.parametrize("layout", ["gemv", "gptq_v2", "compressed-tensors", "mlx"])
def test_a_converted_checkpoint_computes_what_the_first_one_does(
    layout: str, gemm: Path, token_lists: list[list[int]], tmp_path: Path
) -> None:
    awq.convert(gemm, tmp_path / "other", layout)
    ids = torch.tensor([token_lists[0]])
    first, second = (
        awq.load_quantized(folder, dtype=torch.float32, kernel="torch")
        for folder in (gemm, tmp_path / "other")
    )
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


@pytest.mark.parametrize(("layout", "bits"), [("gptq_v2", 3), ("compressed-tensors", 8), ("mlx", 6)])
def test_other_widths_compute_what_their_values_say_and_are_saved_for_us(
    layout: Any, bits: int, gemm: Path, token_lists: list[list[int]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from awq.model.quantized import QuantizedCheckpoint

    config = QuantConfig(bits, 32, format=layout, method="rtn")
    awq.quantize(gemm.parent / "float", tmp_path / "q", config, token_lists)
    reference = AutoModelForCausalLM.from_pretrained(gemm.parent / "float", dtype=torch.float32).eval()
    checkpoint = QuantizedCheckpoint(tmp_path / "q")
    for name in checkpoint.layers:
        reference.get_submodule(name).weight.data = checkpoint.weight(name).dequantize()
    model = awq.load_quantized(tmp_path / "q", dtype=torch.float32)
    ids = torch.tensor([token_lists[0]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=2e-5, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    again = awq.load_quantized(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    awq.convert(tmp_path / "saved", tmp_path / "back", layout)
    back = QuantizedCheckpoint(tmp_path / "back")
    for name in checkpoint.layers:
        assert torch.equal(back.weight(name).dequantize(), checkpoint.weight(name).dequantize())


def test_a_float_folder_and_one_that_should_stay_on_disk_are_refused(gemm: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantize it first"):
        awq.load_quantized(tmp_path / "float")
    awq.convert(gemm, tmp_path / "gptq", "gptq_v2")
    with pytest.raises(ConfigError, match="awq convert"):
        awq.load_quantized(tmp_path / "gptq", device_map={"": "disk"})


def test_what_has_no_exact_form_is_refused(gemm: Path, tmp_path: Path) -> None:
    awq.convert(gemm, tmp_path / "gptq", "gptq_v2")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"]["bits"] = 5
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="5 bits"):
        awq.load_quantized(tmp_path / "gptq")

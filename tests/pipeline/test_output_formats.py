"""Layouts that `quantize` writes without a detour, in every width that they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import awq
from awq import QuantConfig
from awq.config import FORMAT_BITS, PLAIN_FORMATS
from awq.errors import ConfigError
from awq.model.quantized import QuantizedCheckpoint
from awq.pipeline import quantize

IDS = [list(range(3, 43)), list(range(50, 71))]
QUICK: dict[str, Any] = {"group_size": 32, "scale_steps": 3}
LAYOUTS = [name for name in FORMAT_BITS if name not in PLAIN_FORMATS]


@pytest.fixture(scope="module")
def model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of one block."""
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", num_key_value_heads=2, num_hidden_layers=1).to(torch.float16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "gemm"])
def test_what_is_written_directly_is_what_a_conversion_gives(
    layout: Any, model: Path, tmp_path: Path
) -> None:
    symmetric = layout == "gptq"
    for name in ("gemm", layout):
        quantize(model, tmp_path / name, QuantConfig(format=name, zero_point=not symmetric, **QUICK), IDS)
    awq.convert(tmp_path / "gemm", tmp_path / "converted", layout)
    ours, theirs = (tmp_path / name for name in (layout, "converted"))
    expected, found = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())


@pytest.mark.parametrize(
    ("layout", "bits"), [(name, bits) for name in LAYOUTS for bits in FORMAT_BITS[name] if bits != 4]
)
def test_every_width_is_better_than_rounding_and_is_read_again(
    layout: Any, bits: int, model: Path, tmp_path: Path
) -> None:
    config = QuantConfig(bits, format=layout, zero_point=layout != "gptq", **QUICK)
    report = quantize(model, tmp_path / "out", config, IDS)
    errors = report.blocks[0].outcome["errors"]
    assert min(errors.values()) < errors["rtn"]
    checkpoint = QuantizedCheckpoint(tmp_path / "out")
    assert {layer.bits for layer in checkpoint.layers.values()} == {bits}
    weights = [checkpoint.weight(name) for name in checkpoint.layers]
    assert max(int(weight.codes.max()) for weight in weights) == 2**bits - 1
    assert all(weight.symmetric for weight in weights) is (layout == "gptq")
    awq.load_quantized(tmp_path / "out")


def test_symmetric_codes_have_no_zero_points_where_the_layout_need_not_have_them(
    model: Path, tmp_path: Path
) -> None:
    for bits in (4, 8):
        config = QuantConfig(bits, format="compressed-tensors", zero_point=False, **QUICK)
        quantize(model, tmp_path / str(bits), config, IDS)
        tensors = load_file(tmp_path / str(bits) / "model.safetensors")
        assert not any(name.endswith("zero_point") for name in tensors)
        entry = json.loads((tmp_path / str(bits) / "config.json").read_text())["quantization_config"]
        assert entry["config_groups"]["group_0"]["weights"]["symmetric"] is True
        assert entry["config_groups"]["group_0"]["weights"]["num_bits"] == bits
    # From one layout that says so to another one.
    awq.convert(tmp_path / "8", tmp_path / "gptq", "gptq")
    awq.convert(tmp_path / "gptq", tmp_path / "back", "compressed-tensors")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.items())


def test_more_bits_are_closer_to_the_original(model: Path, tmp_path: Path) -> None:
    errors = []
    for bits in (2, 3, 4, 8):
        report = quantize(model, tmp_path / str(bits), QuantConfig(bits, format="mlx", **QUICK), IDS)
        errors.append(report.blocks[0].outcome["error"])
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 100 * errors[3]


def test_the_conv1d_of_a_gpt2_is_refused_where_no_reader_takes_it(tiny: Any, tmp_path: Path) -> None:
    tiny("gpt2", n_embd=64, n_head=4, n_layer=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="Conv1D") as caught:
        quantize(tmp_path / "model", tmp_path / "out", QuantConfig(format="mlx", **QUICK), IDS)
    assert "would serve" not in str(caught.value)  # no group size changes it
    assert not (tmp_path / "out").exists()

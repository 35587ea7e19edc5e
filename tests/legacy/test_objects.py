"""What stands for AutoAWQ's functions and classes does what theirs did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from awq.errors import ConfigError
from awq.formats import gemm
from awq.legacy import objects
from awq.legacy.config import AwqConfig
from awq.nn import QuantLinear


def rounded(linear: nn.Linear, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points `[groups, out]` of plain rounding to 4 bits, as AutoAWQ passes them."""
    grouped = linear.weight.data.view(linear.out_features, -1, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = (high - low) / 15
    return scales.t().contiguous(), (-low / scales).round().clamp(0, 15).t().contiguous()


def test_wqlinear_gemm_rounds_a_linear_layer_to_given_scales() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 24)
    scales, zeros = rounded(linear, 32)
    layer = objects.WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales, zeros=zeros)
    assert isinstance(layer, objects.WQLinear_GEMM) and isinstance(layer, QuantLinear)
    assert layer.qweight.shape == (64, 3) and layer.qzeros.shape == (2, 3) and layer.scales.shape == (2, 24)
    step, weight = scales.t().repeat_interleave(32, 1), linear.weight.data
    # Half a step, and at the ends of a range, whose zero point is rounded, a whole one.
    assert bool(((layer.dequantize() - weight).abs() <= step * 1.01).all())
    assert float(((layer.dequantize() - weight).abs() / step).mean()) < 0.3
    assert torch.equal(layer.bias, linear.bias.half())


def test_wqlinear_gemm_can_be_made_empty_and_filled() -> None:
    linear = nn.Linear(64, 16, bias=False)
    scales, zeros = rounded(linear, 64)
    full = objects.WQLinear_GEMM.from_linear(linear, 4, -1, scales=scales, zeros=zeros)
    for empty in (
        objects.WQLinear_GEMM(4, -1, 64, 16, False, "cpu"),
        objects.WQLinear_GEMM.from_linear(linear, 4, -1, init_only=True),
    ):
        empty.load_state_dict(full.state_dict())
        assert torch.equal(empty.dequantize(), full.dequantize())


def test_wqlinear_gemm_needs_scales() -> None:
    with pytest.raises(ConfigError, match="needs scales and zeros"):
        objects.WQLinear_GEMM.from_linear(nn.Linear(64, 16), 4, 32)


@pytest.mark.parametrize("name", ["GEMV", "GEMVFast", "Marlin", "Exllama", "ExllamaV2", "IPEX"])
def test_other_kernels_layers_serve_isinstance_only(name: str) -> None:
    kind = getattr(objects, f"WQLinear_{name}")
    assert not isinstance(QuantLinear(64, 16, 32), kind)
    for make in (kind, kind.from_linear):
        with pytest.raises(ConfigError, match=f"WQLinear_{name}: layers do not differ by kernel"):
            make(4, 32, 64, 16, False, "cpu")


def test_dequantize_gemm_gives_the_transposed_weight() -> None:
    linear = nn.Linear(64, 16, bias=False)
    scales, zeros = rounded(linear, 32)
    layer = objects.WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales, zeros=zeros)
    weight = objects.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32)
    assert weight.dtype == torch.float16 and weight.shape == (64, 16)
    assert torch.equal(weight, layer.dequantize(torch.float16).t())
    assert torch.equal(gemm.unpack(layer.state_dict()).dequantize(), layer.dequantize())


def test_calibration_samples_are_rows_of_ids() -> None:
    samples = objects.get_calib_dataset([[1, 2, 3], [4, 5, 6, 7, 8]], n_samples=3, max_seq_len=4)
    assert [sample.tolist() for sample in samples] == [[[1, 2, 3]], [[4, 5, 6, 7]], [[8]]]


def test_the_model_type_is_read_without_running_code(books6m: Path) -> None:
    assert objects.check_and_get_model_type(str(books6m)) == "llama"
    assert "llama" in objects.AWQ_CAUSAL_LM_MODEL_MAP


def test_the_configuration_goes_to_each_spelling_and_back(tmp_path: Path) -> None:
    config = AwqConfig.from_dict({"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True})
    assert (config.version, config.q_group_size) == ("gemm", 64)
    assert AwqConfig.from_dict(config.to_dict()) == config
    assert AwqConfig.from_entry(config.to_transformers_dict()) == config
    assert AwqConfig.from_dict({}) == AwqConfig()
    assert AwqConfig.from_dict({"version": "GEMV"}).version == "gemv"


def test_the_configuration_is_read_from_a_checkpoint(books6m: Path, tmp_path: Path) -> None:
    assert AwqConfig.from_pretrained(str(books6m)) == AwqConfig()
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 4, "group_size": 32}}')
    assert AwqConfig.from_pretrained(tmp_path).q_group_size == 32


def test_a_configuration_entry_that_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown option 'q_bits'"):
        AwqConfig.from_dict({"q_bits": 4})

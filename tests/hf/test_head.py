"""An output head rounded to 8 bits at loading: what it computes, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from awq import AutoAWQForCausalLM, load_quantized
from awq.errors import ConfigError
from awq.hf.head import quantize_head
from awq.kernels import cpu_native
from awq.nn import QuantLinear
from rounded import prompt, quantized_pair, relative, same_files

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
# Family and sizes: heads that are untied, tied, and with a bias.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi": {"num_key_value_heads": 2},
}


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: Any) -> Path:
    return quantized_pair(tiny("llama", num_key_value_heads=2), tmp_path)[0]


@pytest.fixture
def compiled() -> None:
    found = cpu_native.load()
    if isinstance(found, str):
        pytest.skip(f"the C++ products cannot be used here: {found}")


def load(folder: Path, **options: Any) -> Any:
    return load_quantized(folder, **{"dtype": torch.float32, **options})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_computes_what_the_rounded_weight_does_and_the_rest_stays(
    family: str, tmp_path: Path, tiny: Any, compiled: None
) -> None:
    folder = quantized_pair(tiny(family, **FAMILIES[family]), tmp_path)[0]
    model, saved = load(folder, head_bits=8), load(folder)
    head, before = model.lm_head, saved.lm_head
    assert isinstance(head, QuantLinear)
    assert (head.bits, head.group_size) == (8, head.in_features)
    weight = head.weight_canonical()
    assert weight.symmetric
    off = (weight.dequantize() - before.weight).abs()
    assert (off <= weight.scales * 0.5001).all()
    assert off.max() > 0
    same = {name: tensor for name, tensor in saved.state_dict().items() if not name.startswith("lm_head")}
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.items())

    expected = load(folder)
    dense = nn.Linear(head.in_features, head.out_features, bias=before.bias is not None)
    dense.weight.data, dense.bias = weight.dequantize(), before.bias
    expected.lm_head = dense
    assert relative(model(prompt()).logits, expected(prompt()).logits) < 1e-5
    assert 1e-4 < relative(model(prompt()).logits, saved(prompt()).logits) < 0.02
    for rows in (1, 3):
        tokens = model.generate(prompt(rows), **GREEDY)
        assert torch.equal(tokens, expected.generate(prompt(rows), **GREEDY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_each_kernel_gives_the_same_logits(dtype: torch.dtype, checkpoint: Path, compiled: None) -> None:
    oracle = load(checkpoint, head_bits=8, kernel="torch", dtype=dtype)
    fast = load(checkpoint, head_bits=8, dtype=dtype)
    assert oracle.lm_head._choice.kernel.name == "torch"
    assert fast.lm_head._choice.kernel.name == "cpu-w4a16"
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert fast.lm_head(hidden).dtype == dtype
    assert relative(fast.lm_head(hidden).float(), oracle.lm_head(hidden).float()) < tolerance


def test_a_kernel_that_serves_no_such_head_is_asked_for_the_other_layers_alone(
    checkpoint: Path, compiled: None
) -> None:
    model = load(checkpoint, head_bits=8, kernel="cpu-w4a8")
    assert model.lm_head._choice.kernel.name == "cpu-w4a8"
    model = load(checkpoint, head_bits=8, kernel="cpu-int4")
    assert model.lm_head._choice.kernel.name == "cpu-w4a16"
    assert model.model.layers[0].mlp.down_proj._choice.kernel.name == "cpu-int4"


@torch.no_grad()
def test_it_goes_with_merged_layers(checkpoint: Path, compiled: None) -> None:
    model, fused = load(checkpoint, head_bits=8), load(checkpoint, head_bits=8, fuse=True, max_seq_len=32)
    assert fused.model.layers[0].mlp.up_proj._merge is not None
    assert isinstance(fused.lm_head, QuantLinear)
    assert torch.equal(model.generate(prompt(), **GREEDY), fused.generate(prompt(), **GREEDY))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_such_a_model_is_neither_saved_nor_dequantized(family: str, tmp_path: Path, tiny: Any) -> None:
    folder = quantized_pair(tiny(family, **FAMILIES[family]), tmp_path)[0]
    model = load(folder, head_bits=8, kernel="torch")
    with pytest.raises(
        ConfigError, match=r"lm_head was rounded .* without head_bits for one that can be saved"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(ConfigError, match="that can be dequantized"):
        model.dequantize()
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


def test_autoawqs_class_takes_it_and_saves_what_was_on_disk(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(checkpoint, head_bits=8, kernel="torch")
    assert isinstance(model.model.lm_head, QuantLinear)
    model.save_quantized(tmp_path / "out")
    same_files(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("bits", [4, 16, 0, "8", True])
def test_there_is_no_head_of_another_width(bits: Any) -> None:
    with pytest.raises(ConfigError, match=r"head_bits=.* is rounded to 8 bits"):
        load_quantized("no folder at all", head_bits=bits)


@torch.no_grad()
def test_without_a_fast_kernel_it_stays_as_it_was_with_a_warning(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_native, "load", lambda: "there is no compiler")
    with pytest.warns(UserWarning, match="the output head stays as it was saved: .*there is no compiler"):
        model = load(checkpoint, head_bits=8)
    assert torch.equal(model(prompt()).logits, load(checkpoint)(prompt()).logits)
    assert model.hf_quantizer.is_serializable()


def test_what_is_no_linear_layer_of_the_model_stays_as_it_was_with_a_warning(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint, head_bits=8, kernel="torch")
    with pytest.warns(UserWarning, match="the output head stays as it was saved: it is quantized already"):
        assert not quantize_head(model)
    model = load(checkpoint)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.warns(UserWarning, match="saved: it is a Sequential, and not a linear layer of the model"):
        assert not quantize_head(model)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.warns(UserWarning, match="saved: the model has none"):
        assert not quantize_head(model)
    assert model.hf_quantizer.rounded_head is None


def test_a_head_that_moves_between_devices_stays_as_it_was_with_a_warning(
    checkpoint: Path, tmp_path: Path
) -> None:
    places: dict[str, Any] = {"model": "cpu", "lm_head": "disk"}
    with pytest.warns(UserWarning, match="saved: accelerate moves its weight or its inputs"):
        model = load(checkpoint, head_bits=8, device_map=places, offload_folder=tmp_path / "off")
    assert not isinstance(model.lm_head, QuantLinear)

"""`from_pretrained` and `save_pretrained` on checkpoints of many shapes, against the dequantized weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AwqConfig,
)

import awq
from awq import QuantConfig
from awq.errors import LoadError
from awq.nn import QuantLinear
from awq.pipeline import quantize
from rounded import FLOAT, prompt, quantized_pair, relative, same_files

EXACT = {"dtype": torch.float32, "quantization_config": AwqConfig(backend="torch")}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture
def pair(tiny: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A quantized Llama with biases in bfloat16, and its dequantized twin."""
    model = tiny("llama", num_key_value_heads=2, attention_bias=True).to(torch.bfloat16)
    return quantized_pair(model, tmp_path, scales_dtype=torch.bfloat16)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "bloom": {"n_head": 4, "n_layer": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_family_gives_the_dequantized_logits_and_is_saved_as_it_was(
    family: str, tiny: Any, tmp_path: Path
) -> None:
    quantized, plain = quantized_pair(tiny(family, **FAMILIES[family]), tmp_path)
    model, info = load(quantized, output_loading_info=True, **EXACT)
    assert not any(info.values()), info
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert relative(model(prompt()).logits, load(plain, dtype=torch.float32)(prompt()).logits) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    same_files(quantized, tmp_path / "saved")


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 4e-3)]
)
@torch.no_grad()
def test_any_dtype_computes_and_scales_keep_theirs(
    dtype: torch.dtype, tolerance: float, pair: tuple[Path, Path]
) -> None:
    expected = load(pair[1], dtype=torch.float32)(prompt()).logits
    model = load(pair[0], dtype=dtype, quantization_config=AwqConfig(backend="torch"))
    logits = model(prompt()).logits
    assert logits.dtype == dtype
    assert relative(logits.float(), expected) < tolerance
    state = model.state_dict()
    assert state["model.layers.0.mlp.up_proj.scales"].dtype == torch.bfloat16
    assert state["model.layers.0.self_attn.q_proj.bias"].dtype == dtype
    assert state["model.norm.weight"].dtype == dtype


@torch.no_grad()
def test_casting_a_loaded_model_leaves_its_scales_alone(pair: tuple[Path, Path]) -> None:
    model = load(pair[0], dtype=torch.bfloat16).to(torch.float32)
    state, stored = model.state_dict(), load_file(pair[0] / "model.safetensors")
    scales = [name for name in stored if name.endswith(".scales")]
    assert scales
    assert all(
        torch.equal(state[name], stored[name]) and state[name].dtype == torch.bfloat16 for name in scales
    )
    assert model(prompt()).logits.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


@torch.no_grad()
def test_saving_after_generating_and_saving_again_changes_nothing(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    model = load(pair[0], dtype="auto")
    model.generate(prompt(), max_new_tokens=3)
    model.save_pretrained(tmp_path / "once")
    same_files(pair[0], tmp_path / "once")
    load(tmp_path / "once", dtype="auto").save_pretrained(tmp_path / "twice")
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file


@torch.no_grad()
def test_saving_in_shards_keeps_every_tensor(pair: tuple[Path, Path], tmp_path: Path) -> None:
    load(pair[0], dtype="auto").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model = load(tmp_path / "shards", dtype="auto")
    model.save_pretrained(tmp_path / "whole")
    same_files(pair[0], tmp_path / "whole")


@torch.no_grad()
def test_what_the_pipeline_writes_is_loaded_by_plain_from_pretrained(
    tiny: Any, tmp_path: Path, token_lists: list[list[int]]
) -> None:
    tiny("qwen2", num_key_value_heads=2).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", QuantConfig(group_size=32), token_lists)
    model, info = load(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.generate(prompt(), max_new_tokens=4).shape == (2, 13)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quantized_head", [False, True], ids=["float head", "quantized head"])
@torch.no_grad()
def test_any_output_layer_loads_and_is_saved_as_it_was(
    tied: bool, quantized_head: bool, tiny: Any, tmp_path: Path
) -> None:
    """A head that is quantized has nothing in common with the embeddings, whatever the configuration says."""
    model = tiny("llama", num_key_value_heads=2, tie_word_embeddings=tied and not quantized_head)
    keep = re.compile("embed|norm") if quantized_head else FLOAT
    entry = {"lm_head": True} if quantized_head else None
    quantized, plain = quantized_pair(model, tmp_path, keep, entry)
    if tied:
        config = (quantized / "config.json").read_text()
        config = config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
        assert '"tie_word_embeddings": true' in config
        (quantized / "config.json").write_text(config)
    model = load(quantized, **EXACT)
    assert isinstance(model.lm_head, QuantLinear) == quantized_head
    model.tie_weights()
    expected = load(plain, dtype=torch.float32)(prompt()).logits
    assert relative(model(prompt()).logits, expected) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    same_files(quantized, tmp_path / "saved")
    assert relative(load(tmp_path / "saved", **EXACT)(prompt()).logits, expected) < 1e-5
    saved = AutoConfig.from_pretrained(tmp_path / "saved").quantization_config
    assert saved.get("lm_head", False) == quantized_head


def vision_language(family: str, tied: bool) -> Any:
    """A tiny model that sees."""
    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": tied,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"},
    }  # fmt: skip
    vision = {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        "qwen2_5_vl": {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64},
    }[family]
    vision |= {"depth": 1, "num_heads": 2, "patch_size": 4}
    tokens = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=tied, **tokens
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_a_vision_language_model_loads_under_its_hub_names(family: str, tied: bool, tmp_path: Path) -> None:
    quantized, plain = quantized_pair(vision_language(family, tied).half(), tmp_path)
    assert "model.layers.0.mlp.up_proj.qweight" in load_file(quantized / "model.safetensors")
    model, info = AutoModelForImageTextToText.from_pretrained(quantized, output_loading_info=True, **EXACT)
    assert not any(info.values()), info
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    reference = AutoModelForImageTextToText.from_pretrained(plain, dtype=torch.float32)
    ids = prompt() % 100 + 10  # none of the special tokens
    assert relative(model(ids).logits, reference(ids).logits) < 1e-5
    AutoModelForImageTextToText.from_pretrained(quantized, dtype="auto").save_pretrained(tmp_path / "saved")
    same_files(quantized, tmp_path / "saved")
    assert type(awq.load_quantized(quantized)) is type(model)


@torch.no_grad()
def test_a_fresh_classifier_on_a_quantized_model_is_allowed(pair: tuple[Path, Path]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(pair[0], num_labels=3)
    assert model(prompt(rows=1)).logits.shape == (1, 3)


@torch.no_grad()
def test_the_base_model_alone_gives_the_hidden_states_of_the_whole(pair: tuple[Path, Path]) -> None:
    whole = load(pair[0], **EXACT)(prompt(), output_hidden_states=True).hidden_states[-1]
    assert relative(AutoModel.from_pretrained(pair[0], **EXACT)(prompt()).last_hidden_state, whole) < 1e-6


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.qweight",
        "model.layers.1.mlp.up_proj.scales",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_an_error_not_a_random_weight(name: str, pair: tuple[Path, Path]) -> None:
    without(pair[0], name)
    stem = name.rpartition(".")[0]
    with pytest.raises(LoadError, match=re.escape(stem)):
        load(pair[0])


def test_codes_of_a_layer_that_the_model_does_not_have_are_an_error(pair: tuple[Path, Path]) -> None:
    tensors = load_file(pair[0] / "model.safetensors")
    tensors["model.layers.0.mlp.extra.qweight"] = tensors["model.layers.0.mlp.up_proj.qweight"].clone()
    save_file(tensors, pair[0] / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"mlp\.extra, which this model does not have"):
        load(pair[0])


def test_codes_and_configuration_that_disagree_are_an_error(tiny: Any, tmp_path: Path) -> None:
    quantized, _ = quantized_pair(tiny("llama"), tmp_path, entry={"group_size": 64})
    with pytest.raises(LoadError, match="the checkpoint and config"):
        load(quantized)


def test_a_pickled_checkpoint_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(pair[0], folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="pickle"):
        load(folder)


def test_one_group_per_row_is_loaded(tiny: Any, tmp_path: Path) -> None:
    """group_size -1 means that every layer's group is as long as its row."""
    model = tiny("llama", intermediate_size=64)
    quantized, plain = quantized_pair(model, tmp_path, entry={"group_size": -1}, group=64)
    with torch.no_grad():
        expected = load(plain, dtype=torch.float32)(prompt()).logits
        assert relative(load(quantized, **EXACT)(prompt()).logits, expected) < 1e-5

"""GGUF files, read back by the gguf package and by transformers' own reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import awq
from awq import QuantConfig
from awq.errors import ConfigError, MissingDependencyError, OutputExistsError
from awq.model.quantized import QuantizedCheckpoint
from awq.pipeline.gguf import llama3_factors

gguf = pytest.importorskip("gguf", reason="GGUF export needs the gguf package (pip install openawq[gguf])")


@pytest.fixture(scope="module")
def checkpoint(books6m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, plainly rounded in groups of 64."""
    out = tmp_path_factory.mktemp("gguf") / "awq"
    awq.quantize(books6m, out, QuantConfig(group_size=64, method="rtn"), samples=2, seq_len=64)
    return out


@pytest.fixture(scope="module")
def file(checkpoint: Path) -> Path:
    awq.export(checkpoint, checkpoint.parent, "gguf")
    return checkpoint.parent / "model.gguf"


def test_the_codes_are_in_the_blocks_as_they_were(checkpoint: Path, file: Path) -> None:
    source = QuantizedCheckpoint(checkpoint)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert tensors["token_embd.weight"].tensor_type.name == "BF16"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        tensor = tensors[f"blk.3.{theirs}.weight"]
        assert tensor.tensor_type.name == "Q4_1"
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = source.weight(f"model.layers.3.{ours}")
        exact = weight.dequantize().numpy()
        # The offset is rounded to float16: an error of 15 / 2048 of a step at most.
        step = weight.scales.float().repeat_interleave(64, 1).numpy()
        assert (np.abs(values - exact) <= step * 15 / 2048).all()


def test_transformers_reads_the_file_and_computes_the_same(
    checkpoint: Path, file: Path, books6m: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from awq.hf import load_quantized

    ours = load_quantized(checkpoint, dtype=torch.float32, kernel="torch")
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids = torch.arange(64).mul(37).remainder(4096).view(1, -1)
    with torch.no_grad():
        expected, found = ours(ids).logits, theirs.eval()(ids).logits
    # Only the rounded offsets differ; a head's rows in the wrong order would change everything.
    assert float((found - expected).abs().max()) < 0.02
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "The captain didn't look at 12345 seas."
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(books6m)(text)["input_ids"]


def test_the_divisors_of_llama3_positions_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, rope_parameters=parameters, max_position_embeddings=131072
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, 128, 2).float() / 128)
    torch.testing.assert_close(plain / llama3_factors(parameters, 500000.0, 128), scaled, rtol=1e-5, atol=0)


def test_a_file_is_replaced_on_purpose_only(checkpoint: Path, tmp_path: Path) -> None:
    result = awq.export(checkpoint, tmp_path / "a.gguf", "gguf")
    assert result.bytes == (tmp_path / "a.gguf").stat().st_size
    with pytest.raises(OutputExistsError, match=r"a\.gguf"):
        awq.export(checkpoint, tmp_path / "a.gguf", "gguf")
    awq.export(checkpoint, tmp_path / "a.gguf", "gguf", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_what_llama_cpp_has_no_place_for_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    with pytest.raises(ConfigError, match="gpt_neox"):
        awq.export(folder, tmp_path / "x.gguf", "gguf")
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(ConfigError, match="yarn"):
        awq.export(folder, tmp_path / "x.gguf", "gguf")
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.extra.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.extra\.weight"):
        awq.export(folder, tmp_path / "x.gguf", "gguf")
    save_file(tensors, folder / "model.safetensors")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="pre-tokenizer"):
        awq.export(folder, tmp_path / "x.gguf", "gguf")
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))


def test_a_missing_package_is_named_with_the_cure(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"openawq\[gguf\]"):
        awq.export(checkpoint, tmp_path / "x.gguf", "gguf")


def test_sentencepiece_tokens_score_by_the_order_of_their_merges(tmp_path: Path, books6m: Path) -> None:
    from awq.pipeline.gguf_tokenizer import add_tokenizer

    vocabulary = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab"]
    tokenizer: dict[str, Any] = {
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {token: index for index, token in enumerate(vocabulary)},
            "merges": [["a", "b"], ["▁", "ab"]],
        },
        "added_tokens": [
            {
                "id": i,
                "content": vocabulary[i],
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i in range(3)
        ],
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "pre_tokenizer": None,
        "decoder": None,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    add_tokenizer(gguf, writer, tmp_path, 10)
    held = {key: value.value for key, value in writer.kv_data[0].items()}
    writer.close()
    assert held["tokenizer.ggml.model"] == "llama"
    assert held["tokenizer.ggml.tokens"] == [*vocabulary, "[PAD9]"]
    scores = held["tokenizer.ggml.scores"]
    assert scores[7] > scores[8]
    assert held["tokenizer.ggml.token_type"] == [2, 3, 3, 6, 1, 1, 1, 1, 1, 5]
    assert held["tokenizer.ggml.add_bos_token"] is True
    assert held["tokenizer.ggml.add_eos_token"] is False
    assert held["tokenizer.ggml.add_space_prefix"] is True

"""AutoAWQ's three calls, as its README shows them, on a folder of this machine."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from awq import AutoAWQForCausalLM, QuantConfig
from awq.errors import AwqError, ConfigError

TEXTS = ["The sea was calm and the captain looked at it.", "And so they went home again, all of them."] * 4


@pytest.fixture(scope="module")
def folder(tiny: Any, books6m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a real tokenizer; tests leave it as it is."""
    out = tmp_path_factory.mktemp("auto") / "model"
    tiny("llama", num_key_value_heads=2, vocab_size=4096, eos_token_id=0).save_pretrained(out)
    for file in books6m.glob("tokenizer*"):
        shutil.copy(file, out)
    return out


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_the_script_of_the_readme_runs(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    quant_config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    model = AutoAWQForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True, use_cache=False)
    model.quantize(tokenizer, quant_config=quant_config, calib_data=TEXTS)
    model.save_quantized(str(tmp_path / "out"))
    tokenizer.save_pretrained(str(tmp_path / "out"))

    again = AutoAWQForCausalLM.from_quantized(str(tmp_path / "out"))
    tokens = tokenizer("The captain", return_tensors="pt").input_ids
    output = again.generate(tokens, do_sample=False, max_new_tokens=5, pad_token_id=0)
    assert output[0, : tokens.shape[1]].tolist() == tokens[0].tolist()
    assert tokens.shape[1] < output.shape[1] <= tokens.shape[1] + 5
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


def test_the_object_is_the_float_model_before_and_the_quantized_one_after(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 6, 7, 8]])
    model = AutoAWQForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        before = model(ids).logits
        assert torch.equal(before, expected)
        assert not model.is_quantized
        model.quantize(quant_config={"q_group_size": 32}, calib_data=TEXTS)
        assert model.is_quantized
        after = model(ids).logits
    assert after.shape == before.shape
    error = float((after - before).norm() / before.norm())
    assert 1e-4 < error < 0.5
    assert model.config.model_type == "llama"
    assert model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (1, 6)


def test_opening_reads_no_weights_and_quantizing_changes_nothing_in_the_folder(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = AutoAWQForCausalLM.from_pretrained(str(folder))
    model.quantize(quant_config=QuantConfig(group_size=32), calib_data=[[5, 6, 7, 8]] * 4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_calibration_is_what_was_given(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    told = []
    for data, options in (
        (TEXTS, {}),
        ([[5, 6, 7], [8]], {}),
        (str(tmp_path / "texts.jsonl"), {"text_column": "body", "max_calib_samples": 3}),
        (TEXTS, {"max_calib_seq_len": 4, "max_calib_samples": 2}),
    ):
        model = AutoAWQForCausalLM.from_pretrained(folder)
        model.quantize(quant_config={"q_group_size": 32}, calib_data=data, **options)
        told.append(model.report.plan.calibration)
    assert "8 samples" in told[0]
    assert "4 tokens in all" in told[1]
    assert "3 samples" in told[2]
    assert "8 tokens in all" in told[3]


def test_parts_of_the_search_can_be_left_out(folder: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(folder)
    config = {"q_group_size": 32, "modules_to_not_convert": ["down_proj"]}
    model.quantize(quant_config=config, calib_data=TEXTS, duo_scaling=False, apply_clip=False)
    assert model.report.config["duo_scaling"] is False
    assert model.report.config["clip"] is False
    assert not any("down_proj" in name for name in model.report.plan.quantized)


def test_what_was_quantized_is_what_is_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(folder)
    model.quantize(quant_config={"q_group_size": 32}, calib_data=TEXTS)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = model(ids).logits
        model.save_quantized(tmp_path / "out")
        again = AutoAWQForCausalLM.from_quantized(tmp_path / "out", fuse_layers=False)
        assert torch.equal(again(ids).logits, expected)
    assert "model.layers.0.mlp.up_proj.qweight" in load_file(tmp_path / "out" / "model.safetensors")


def test_arguments_without_a_meaning_warn_and_say_why(folder: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = AutoAWQForCausalLM.from_pretrained(folder)
        model.quantize(quant_config={"q_group_size": 32}, calib_data=TEXTS)
        model.save_quantized(tmp_path / "out")
        AutoAWQForCausalLM.from_quantized(tmp_path / "out")
    with pytest.warns(UserWarning, match="max_seq_len has no effect"):
        AutoAWQForCausalLM.from_quantized(tmp_path / "out", max_seq_len=64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"w_bit": 3}, "bits=3"),
        ({"q_group_size": 100}, "group_size=100"),
        ({"version": "no_such_layout"}, "no_such_layout"),
        ({"w_bits": 4}, "w_bits"),
    ],
)
def test_dictionaries_without_a_meaning_are_refused(
    config: dict[str, Any], message: str, folder: Path
) -> None:
    model = AutoAWQForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match=message):
        model.quantize(quant_config=config, calib_data=TEXTS)
    assert not model.is_quantized


def test_calls_in_the_wrong_order_are_errors_of_ours(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AwqError, match="from_pretrained"):
        AutoAWQForCausalLM()
    model = AutoAWQForCausalLM.from_pretrained(folder)
    with pytest.raises(AwqError, match="call quantize first"):
        model.save_quantized(tmp_path / "nothing")
    model.quantize(quant_config={"q_group_size": 32}, calib_data=TEXTS)
    with pytest.raises(AwqError, match="quantized already"):
        model.quantize(quant_config={"q_group_size": 32}, calib_data=TEXTS)
    with pytest.raises(AwqError):
        AutoAWQForCausalLM.from_quantized(folder)


def test_other_models_in_the_folder_are_not_overwritten(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    model = AutoAWQForCausalLM.from_pretrained(folder)
    model.quantize(quant_config={"q_group_size": 32}, calib_data=TEXTS)
    with pytest.raises(AwqError, match="other holds"):
        model.save_quantized(other)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before


def test_missing_models_are_named(tmp_path: Path) -> None:
    for call in (AutoAWQForCausalLM.from_pretrained, AutoAWQForCausalLM.from_quantized):
        with pytest.raises(AwqError, match="no-such-model"):
            call("no-such-model")
        with pytest.raises(AwqError, match=r"config\.json does not exist"):
            call(tmp_path)

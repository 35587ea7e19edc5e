"""The object behind `AutoAWQForCausalLM`: what it saves, what it is, and what its arguments do."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
)

from autoawq_calls import PROMPT, QUANT_CONFIG, SMALL, config_of
from awq import AutoAWQForCausalLM, QuantConfig, folder_model
from awq.errors import AlreadyQuantizedError, ConfigError, OutputExistsError
from awq.hf import load_quantized
from awq.legacy.config import AwqConfig

pytestmark = pytest.mark.usefixtures("unanswered")


# save_quantized


@pytest.mark.parametrize(("size", "most"), [("2MB", 2 * 10**6), ("1MiB", 2**20), (3_000_000, 3_000_000)])
def test_shard_size_is_honoured(quantized: Path, tmp_path: Path, size: str | int, most: int) -> None:
    AutoAWQForCausalLM.from_quantized(str(quantized)).save_quantized(str(tmp_path / "out"), shard_size=size)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    whole = load_file(quantized / "model.safetensors")
    largest = max(tensor.nbytes for tensor in whole.values())
    found = {}
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= max(most, largest)
        found |= tensors
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    again = AutoAWQForCausalLM.from_quantized(str(tmp_path / "out"))
    assert again.is_quantized


def test_a_size_without_meaning_is_refused(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard_size='large'"):
        AutoAWQForCausalLM.from_quantized(str(quantized)).save_quantized(tmp_path, shard_size="large")


def test_asking_for_pickles_warns_and_writes_safetensors(quantized: Path, tmp_path: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(str(quantized))
    with pytest.warns(UserWarning, match="safetensors has no effect"):
        model.save_quantized(str(tmp_path / "out"), safetensors=False)
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_tokenizer_saved_before_the_model_stays(quantized: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"mine": true}')
    AutoAWQForCausalLM.from_quantized(str(quantized)).save_quantized(str(tmp_path))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"mine": True}
    assert (tmp_path / "tokenizer.json").exists()


def test_another_model_is_never_overwritten(quantized: Path, books6m: Path, tmp_path: Path) -> None:
    shutil.copytree(books6m, tmp_path / "original")
    before = (tmp_path / "original/model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="holds another model"):
        AutoAWQForCausalLM.from_quantized(str(quantized)).save_quantized(tmp_path / "original")
    assert (tmp_path / "original/model.safetensors").read_bytes() == before


def test_a_model_without_codes_is_not_saved(books6m: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to save"):
        AutoAWQForCausalLM.from_pretrained(books6m).save_quantized(tmp_path)


# what the object is


def test_the_float_model_answers_as_the_transformers_model_does(books6m: Path, tokenizer: Any) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m), torch_dtype=torch.float32)
    assert model.config.model_type == model.model_type == "llama"
    assert model.quant_config.to_dict() == AwqConfig().to_dict()
    assert model.search_result is None and model.processor is None
    assert model._model is None, "nothing so far needs the weights"
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    expected = AutoModelForCausalLM.from_pretrained(books6m, dtype=torch.float32)(ids).logits
    assert torch.equal(model.eval()(ids).logits, expected)
    assert torch.equal(model.to("cpu")(ids).logits, expected)
    assert model.train().training and not model.eval().training


def test_the_dtype_of_the_float_model_is_the_dtype_saved(books6m: Path, tmp_path: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m), torch_dtype=torch.float16)
    model.quantize(None, QUANT_CONFIG, **SMALL)
    model.save_quantized(str(tmp_path))
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        assert tensors.get_tensor("model.embed_tokens.weight").dtype == torch.float16
    assert config_of(tmp_path)["dtype"] == "float16"


def test_a_quantconfig_of_ours_counts_as_it_is(books6m: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    model.quantize(None, QuantConfig(group_size=64, clip=False, method="rtn"), **SMALL)
    assert model.report.config["method"] == "rtn" and model.report.config["clip"] is False
    assert model.quant_config.q_group_size == 64


def test_each_entry_point_names_the_other(books6m: Path, quantized: Path) -> None:
    with pytest.raises(AlreadyQuantizedError, match="from_quantized"):
        AutoAWQForCausalLM.from_pretrained(str(quantized))
    with pytest.raises(ConfigError, match="from_pretrained"):
        AutoAWQForCausalLM.from_quantized(str(books6m))
    with pytest.raises(AlreadyQuantizedError, match="already"):
        AutoAWQForCausalLM.from_quantized(str(quantized)).quantize(None, QUANT_CONFIG, **SMALL)
    with pytest.raises(ConfigError, match="from_pretrained"):
        AutoAWQForCausalLM()


def test_another_weight_file_is_not_passed_over(quantized: Path) -> None:
    with pytest.raises(ConfigError, match=r"quant_filename='awq_model_w4_g128.pt'"):
        AutoAWQForCausalLM.from_quantized(str(quantized), "awq_model_w4_g128.pt")


def test_an_argument_without_effect_warns_once_at_the_callers_line(quantized: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            AutoAWQForCausalLM.from_quantized(str(quantized), max_seq_len=128, batch_size=4)
    ours = [warning for warning in caught if "has no effect" in str(warning.message)]
    assert sorted(str(warning.message).split()[0] for warning in ours) == ["batch_size", "max_seq_len"]
    assert {warning.filename for warning in ours} == {__file__}


def test_defaults_warn_of_nothing(quantized: Path, silent: None) -> None:
    AutoAWQForCausalLM.from_quantized(str(quantized), "", 2048, False, safetensors=True)


def test_placement_and_configuration_reach_the_loader(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def record(folder: Path, **kwargs: Any) -> Any:
        given.update(kwargs)
        return load_quantized(folder, **kwargs)

    monkeypatch.setattr(folder_model, "load_quantized", record)
    placing = {
        "device_map": "auto",
        "max_memory": {"cpu": "1GB"},
        "offload_folder": str(tmp_path / "offload"),
    }
    model = AutoAWQForCausalLM.from_quantized(
        str(quantized), **placing, attn_implementation="eager", download_kwargs={"revision": "main"}
    )
    assert given == {
        **placing,
        "dtype": "auto",
        "trust_remote_code": False,
        "attn_implementation": "eager",
    }
    assert model.config._attn_implementation == "eager"


def test_a_hub_name_is_fetched_with_the_download_options(
    books6m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        given.update(options, name=name)
        return str(books6m)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    options = {"revision": "v1", "ignore_patterns": ["*.md"]}
    model = AutoAWQForCausalLM.from_pretrained("owner/name", download_kwargs=options)
    assert given["name"] == "owner/name" and options.items() <= given.items()
    assert not [pattern for pattern in given["allow_patterns"] if pattern.endswith(".bin")]
    assert model.model_type == "llama"


def test_the_float_models_configuration_takes_use_cache(books6m: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m), use_cache=True, attn_implementation="eager")
    assert model.model.config.use_cache is True
    assert model.model.config._attn_implementation == "eager"

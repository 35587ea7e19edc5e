"""Every option that AutoAWQ's users write in `AwqConfig` is honoured or answered."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AwqConfig

from awq import load_quantized
from awq.errors import ConfigError
from awq.nn import QuantLinear
from rounded import prompt, quantized_pair, relative, same_files


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> Path:
    return quantized_pair(tiny("llama", num_key_value_heads=2), tmp_path)[0]


def loaded_with(checkpoint: Path, config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)


def kernels(model: Any) -> set[str]:
    return {m._choice.kernel.name for m in model.modules() if isinstance(m, QuantLinear) and m._choice}


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"version": "marlin"}, "version='marlin' has no effect"),
        ({"version": "exllama"}, "the kernel is chosen|its kernel is chosen"),
        ({"version": "gemv"}, "its layout is its own"),
        ({"version": "GEMVFast"}, "its layout is its own"),
        ({"version": "gemv_fast"}, "its layout is its own"),
        ({"version": "ipex"}, "its kernel is chosen"),
        ({"modules_to_fuse": {"mlp": ["gate_proj"]}}, "modules_to_fuse names nothing here"),
        ({"do_fuse": False, "fuse_max_seq_len": 64}, "fuse_max_seq_len has no effect with do_fuse=False"),
        ({"exllama_config": {"version": 2}}, "exllama_config has no effect"),
        ({"backend": "exllama_v2"}, "OpenAWQ takes the fastest of its own"),
        ({"backend": "machete"}, "OpenAWQ takes the fastest of its own"),
        ({"no_such_option": 1}, "does not know no_such_option"),
    ],
)
def test_an_option_without_effect_is_answered_once_and_the_model_loads(
    options: dict[str, Any], answer: str, checkpoint: Path
) -> None:
    with pytest.warns(UserWarning, match=answer) as caught:
        config = AwqConfig(bits=4, **options)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    loaded_with(checkpoint, config)(prompt())


@pytest.mark.parametrize(
    "options",
    [{}, {"version": "gemm"}, {"backend": "auto"}, {"do_fuse": False}, {"do_fuse": True}],
)
def test_options_that_mean_what_happens_anyway_are_silent(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AwqConfig(bits=4, **options)


@pytest.mark.parametrize(
    ("backend", "kernel"), [("torch", "torch"), ("torch_awq", "torch"), ("cpu-int4", "cpu-int4")]
)
def test_a_backend_that_names_a_kernel_of_ours_is_obeyed(backend: str, kernel: str, checkpoint: Path) -> None:
    assert kernels(loaded_with(checkpoint, AwqConfig(backend=backend))) == {kernel}


def test_the_marlin_backend_asks_for_what_there_is_of_its_kind_and_loads_where_there_is_none(
    checkpoint: Path,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = AwqConfig(backend="marlin")
    model = loaded_with(checkpoint, config)
    layer = next(module for module in model.modules() if isinstance(module, QuantLinear))
    assert "not humming: it runs on NVIDIA GPUs, not on cpu" in layer.prepare(prefer="marlin").reason
    assert layer._prefer == "marlin"
    assert kernels(model) == kernels(loaded_with(checkpoint, AwqConfig()))


def test_an_unknown_backend_is_an_error_that_lists_the_kernels() -> None:
    with pytest.raises(ConfigError, match=r"cpu-int4, .*torch"):
        AwqConfig(backend="warp")


def test_a_float_model_is_not_quantized_by_a_configuration(tiny: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="awq quantize"):
        loaded_with(tmp_path, AwqConfig())


def change(checkpoint: Path, **fields: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= fields
    (checkpoint / "config.json").write_text(json.dumps(config))


@torch.no_grad()
@pytest.mark.parametrize(
    ("version", "layout"),
    [("gemv", "gemv"), ("gemv_fast", "gemv_fast"), ("GEMVFast", "llm_awq"), ("marlin", "marlin")],
)
def test_a_checkpoint_in_another_of_autoawqs_layouts_is_loaded_and_saved_in_it(
    version: str, layout: str, tiny: Any, tmp_path: Path
) -> None:
    """Two of these, transformers itself fails to parse."""
    model = tiny("llama", num_key_value_heads=4)
    entry = {"version": version, "zero_point": version != "marlin"}
    quantized, plain = quantized_pair(model, tmp_path, entry=entry, layout=layout)
    model = loaded_with(quantized, AwqConfig(backend="torch"))
    reference = AutoModelForCausalLM.from_pretrained(plain)
    assert relative(model(prompt()).logits, reference(prompt()).logits) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    same_files(quantized, tmp_path / "saved")
    again = loaded_with(tmp_path / "saved", AwqConfig(backend="torch"))
    assert torch.equal(again(prompt()).logits, model(prompt()).logits)


def test_a_checkpoint_of_an_unknown_version_is_refused_in_a_sentence(checkpoint: Path) -> None:
    change(checkpoint, version="warp")
    with pytest.raises(ConfigError, match="AWQ version 'warp' is unknown; known are: gemm"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("version", ["GEMM", "exllama", "ipex"])
def test_a_checkpoint_whose_version_names_a_kernel_is_read_as_gemm(version: str, checkpoint: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(checkpoint)(prompt()).logits
    change(checkpoint, version=version)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(model(prompt()).logits, expected)
    assert model.config.quantization_config.to_dict()["version"] == "gemm"


@pytest.mark.parametrize("fields", [{"bits": 3}, {"zero_point": False}])
def test_a_checkpoint_of_another_kind_is_refused(fields: dict[str, Any], checkpoint: Path) -> None:
    change(checkpoint, **fields)
    with pytest.raises(ConfigError):
        AutoModelForCausalLM.from_pretrained(checkpoint)


OLD_NAMES = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}


def test_autoawqs_old_names_are_understood(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", **OLD_NAMES}
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.config.quantization_config.to_dict()["group_size"] == 32


def test_an_older_projects_own_file_is_read_by_our_loader(checkpoint: Path, tmp_path: Path) -> None:
    """transformers does not look for `quant_config.json`; what is saved says everything in `config.json`."""
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "quant_config.json").write_text(json.dumps(OLD_NAMES))
    load_quantized(checkpoint).save_pretrained(tmp_path / "saved")
    (kernel,) = kernels(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert kernel.startswith("cpu-")


def test_what_is_saved_is_what_engines_read_and_nothing_of_gptqs(checkpoint: Path, tmp_path: Path) -> None:
    stray = {"sym": True, "desc_act": False, "backend": "autoawq", "do_fuse": False, "exllama_config": None}
    change(checkpoint, lm_head=False, **stray)
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
        "lm_head": False,
    }

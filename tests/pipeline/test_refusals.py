"""Wishes that cannot be fulfilled are answered before anything is written, with a cure that cures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from awq import QuantConfig
from awq.errors import AwqError, CalibrationError, ConfigError, LoadError
from awq.pipeline import Plan, quantize

SMALL = QuantConfig(group_size=32, scale_steps=2, rounding="nearest")


@pytest.fixture(scope="module")
def model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama without a tokenizer; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", num_key_value_heads=2).save_pretrained(folder)
    return folder


class Told:
    """Remembers the plan."""

    plan: Plan

    def planned(self, plan: Plan) -> None:
        self.plan = plan

    def block_done(self, *_: Any) -> None:
        pass

    def note(self, message: str) -> None:
        pass


def test_text_without_a_tokenizer_is_refused_with_the_cure(model: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no tokenizer that can be loaded.*token ids"):
        quantize(model, tmp_path / "out", SMALL, ["some text"])
    assert not (tmp_path / "out").exists()


def test_a_damaged_tokenizer_is_an_error_of_ours(books6m: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(books6m, tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError, match="no tokenizer that can be loaded"):
        quantize(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"batch_tokens": 0}, "batch_tokens=0 must be at least 1"),
        ({"batch_tokens": -5}, "batch_tokens=-5 must be at least 1"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0 must be at least 1"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"device": "meta"}, "device 'meta' cannot be used here"),
    ],
)
def test_numbers_and_names_without_meaning_are_refused(
    options: dict[str, Any], message: str, model: Path, tmp_path: Path, token_lists: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(model, tmp_path / "out", SMALL, token_lists, **options)
    assert not (tmp_path / "out").exists()


def test_leaving_every_layer_alone_is_refused_for_what_it_is(
    model: Path, tmp_path: Path, token_lists: Any
) -> None:
    config = QuantConfig(group_size=32, modules_to_not_convert=("proj",))
    with pytest.raises(ConfigError, match="named in modules_to_not_convert") as caught:
        quantize(model, tmp_path / "out", config, token_lists)
    assert "would serve" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"intermediate_size": 96, "hidden_size": 96, "num_attention_heads": 3}, {"group_size": 64}),
        ({}, {"group_size": 128, "modules_to_not_convert": ("down_proj",)}),
        ({"num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 100}, {"group_size": 48}),
    ],
)
def test_the_group_size_that_is_proposed_serves_as_many_layers_as_it_says(
    changes: dict[str, Any], config: dict[str, Any], tiny: Any, tmp_path: Path, token_lists: Any
) -> None:
    tiny("llama", **changes).save_pretrained(tmp_path / "in")
    with pytest.raises(ConfigError) as caught:
        quantize(tmp_path / "in", tmp_path / "out", QuantConfig(**config), token_lists)
    found = re.search(r"group_size=(\d+) would serve (\d+) of (\d+)", str(caught.value))
    assert found is not None
    size, served, total = map(int, found.groups())
    assert size != config["group_size"]
    told = Told()
    quantize(
        tmp_path / "in",
        tmp_path / "out",
        QuantConfig(**config | {"group_size": size}),
        token_lists,
        progress=told,
    )
    assert len(told.plan.quantized) == served
    assert total == 14


def test_a_model_with_no_layer_that_any_group_size_serves_is_told_so(
    tiny: Any, tmp_path: Path, token_lists: Any
) -> None:
    sizes = {"hidden_size": 20, "intermediate_size": 36, "num_attention_heads": 1, "num_key_value_heads": 1}
    tiny("llama", **sizes, head_dim=20).save_pretrained(tmp_path / "in")
    with pytest.raises(ConfigError, match="serves no layer of this model") as caught:
        quantize(tmp_path / "in", tmp_path / "out", SMALL, token_lists)
    assert "would serve" not in str(caught.value)


def test_a_plan_is_told_before_the_first_byte_is_written(
    model: Path, tmp_path: Path, token_lists: Any
) -> None:
    class Stop(BaseException):
        pass

    class Stopping(Told):
        def planned(self, plan: Plan) -> None:
            super().planned(plan)
            raise Stop

    told = Stopping()
    with pytest.raises(Stop):
        quantize(model, tmp_path / "out", SMALL, token_lists, progress=told)
    plan = told.plan
    assert plan.blocks == 2
    assert len(plan.quantized) == 14
    assert plan.skipped == {"lm_head": "outside the decoder blocks"}
    assert plan.peak_bytes > 0
    assert plan.resumed_at == 0
    quantize(model, tmp_path / "out", SMALL, token_lists)
    file = tmp_path / "out" / "model.safetensors"
    assert plan.output_bytes == file.stat().st_size
    assert plan.disk_bytes > plan.output_bytes


def test_every_token_of_a_ragged_calibration_reaches_the_statistics(
    model: Path, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from awq.pipeline import run

    real, counts = run.measure, []

    def measure(*arguments: Any) -> Any:
        seen = real(*arguments)
        counts.append({name: total.tokens for name, total in seen.stats.items()})
        return seen

    monkeypatch.setattr(run, "measure", measure)
    quantize(model, tmp_path / "out", SMALL, token_lists, batch_tokens=100)
    expected = sum(map(len, token_lists))
    assert len(counts) == 2
    assert all(set(block.values()) == {expected} for block in counts)


def test_long_samples_are_split_and_none_of_their_tokens_lost(
    model: Path, tmp_path: Path, token_lists: Any
) -> None:
    told = Told()
    quantize(model, tmp_path / "out", SMALL, token_lists, seq_len=16, progress=told)
    assert "222 tokens in all" in told.plan.calibration
    assert "samples of up to 16 tokens" in told.plan.calibration


def test_weights_too_large_for_the_dtype_asked_for_are_refused_by_name(
    tiny: Any, tmp_path: Path, token_lists: Any
) -> None:
    made = tiny("llama", num_key_value_heads=2)
    made.model.norm.weight.data[3] = 1e6
    made.save_pretrained(tmp_path / "in")
    config = QuantConfig(group_size=32, scale_steps=2, dtype="float16")
    with pytest.raises(AwqError, match=r"model\.norm\.weight has values that float16 cannot hold; use"):
        quantize(tmp_path / "in", tmp_path / "out", config, token_lists)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_configuration_that_speaks_of_no_quantization_leaves_no_trace(
    model: Path, tmp_path: Path, token_lists: Any
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "in"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    quantize(folder, tmp_path / "out", QuantConfig(group_size=32, method="rtn", format="float"), token_lists)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_nested_configurations_are_carried_over(model: Path, tmp_path: Path, token_lists: Any) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "in"))
    (folder / "speech").mkdir()
    (folder / "speech" / "config.json").write_text('{"kept": true}')
    quantize(folder, tmp_path / "out", SMALL, token_lists)
    assert (tmp_path / "out" / "speech" / "config.json").read_text() == '{"kept": true}'


def test_calibration_that_a_model_cannot_digest_is_named_and_leaves_nothing_whole(
    tiny: Any, tmp_path: Path, token_lists: Any
) -> None:
    """Finite weights, and yet infinite activations behind the second block."""
    made = tiny("llama", num_key_value_heads=2)
    made.model.layers[1].mlp.down_proj.weight.data.fill_(3e38)
    made.save_pretrained(tmp_path / "in")
    config = QuantConfig(group_size=32, scale_steps=2, dtype="bfloat16")
    with pytest.raises(AwqError, match=r"model\.layers\.1 gives NaN or infinity"):
        quantize(tmp_path / "in", tmp_path / "out", config, token_lists)
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(CalibrationError, match="empty"):
        quantize(tmp_path / "in", tmp_path / "out", config, [])


def test_the_default_dtype_of_torch_does_not_matter(model: Path, tmp_path: Path, token_lists: Any) -> None:
    quantize(model, tmp_path / "one", SMALL, token_lists)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        quantize(model, tmp_path / "two", SMALL, token_lists)
    finally:
        torch.set_default_dtype(before)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()

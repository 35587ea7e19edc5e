"""What checkpoints say about themselves, in every project's words."""

from __future__ import annotations

from typing import Any

import pytest

from awq.config import FORMAT_BITS, PLAIN_FORMATS, Setting
from awq.errors import ConfigError
from awq.formats import LAYOUTS
from awq.formats.detect import detect, entry_of
from awq.formats.entry import MIXING, entry_for

COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
        }
    },
    "ignore": ["lm_head", "re:.*gate$"],
}


@pytest.mark.parametrize(
    ("entry", "layout", "group_size"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, "gemm", 64),
        ({"quant_method": "awq", "bits": 4, "version": "GEMM"}, "gemm", 128),
        ({"quant_method": "awq", "bits": 4}, "gemm", 128),
        ({"quant_method": "awq", "version": "exllama"}, "gemm", 128),
        ({"quant_method": "awq", "version": "GEMV", "group_size": 32}, "gemv", 32),
        ({"quant_method": "awq", "version": "gemv_fast"}, "gemv_fast", 128),
        ({"quant_method": "awq", "version": "GEMVFast"}, "gemv_fast", 128),
        ({"quant_method": "awq", "version": "marlin", "zero_point": False}, "marlin", 128),
        ({"quant_method": "awq", "checkpoint_format": "gemm", "group_size": -1}, "gemm", -1),
        # AutoAWQ's and llm-awq's quant_config.json.
        ({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}, "gemm", 64),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, "gptq", 128),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"},
            "gptq_v2",
            64,
        ),
        # AutoGPTQ's quantize_config.json.
        ({"bits": 4, "group_size": 128, "desc_act": False, "sym": True}, "gptq", 128),
        (COMPRESSED, "compressed-tensors", 128),
        ({"quant_method": "mlx", "group_size": 64, "bits": 4}, "mlx", 64),
    ],
)
def test_the_layout_and_the_group_size_are_read(entry: dict[str, Any], layout: str, group_size: int) -> None:
    found = detect(entry)
    assert (found.layout, found.bits, found.group_size) == (layout, 4, group_size)


def test_llm_awq_is_told_by_the_name_of_its_tensors() -> None:
    entry = {"quant_method": "awq", "version": "gemv_fast"}
    assert detect(entry, {"qweight", "scales", "scaled_zeros"}).layout == "llm_awq"
    assert detect(entry, {"qweight", "scales", "qzeros"}).layout == "gemv_fast"


def test_skipped_layers_and_exceptions_are_read() -> None:
    awq = detect({"quant_method": "awq", "modules_to_not_convert": ["lm_head"]})
    assert awq.skipped == ("lm_head",)
    assert detect(COMPRESSED).skipped == ("lm_head",)
    mlx = detect(
        {"quant_method": "mlx", "group_size": 64, "bits": 4, "a": {"bits": 8}, "b": False, "mode": "affine"}
    )
    assert (mlx.setting("a"), mlx.setting("c")) == ((8, 64), (4, 64))
    assert mlx.skipped == ("b",)


def test_a_pattern_of_compressed_tensors_stands_for_every_layer_that_it_matches() -> None:
    weights = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    groups = {
        "group_0": {"targets": ["a", r"re:.*\.mlp\."], "weights": weights},
        "group_1": COMPRESSED["config_groups"]["group_0"] | {"targets": ["b"]},
    }
    found = detect(COMPRESSED | {"config_groups": groups})
    settings = [found.setting(name) for name in ("a", "b", "layers.0.mlp.up", "layers.0.attn.q")]
    assert settings == [(8, -1), (4, 128), (8, -1), (8, -1)]
    assert not found.symmetric
    assert detect(COMPRESSED | {"config_groups": {"g": groups["group_0"]}}).symmetric


def test_the_entry_is_found_where_each_project_puts_it() -> None:
    assert entry_of({"quantization": {"group_size": 64, "bits": 4}}) == {
        "group_size": 64,
        "bits": 4,
        "quant_method": "mlx",
    }
    assert entry_of({"text_config": {"quantization_config": {"quant_method": "awq"}}}) == {
        "quant_method": "awq"
    }
    assert entry_of({"model_type": "llama"}) is None


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"some": "thing"}, "None"),
        ({"quant_method": "awq", "version": "gemx"}, "gemx"),
        ({"quant_method": "awq", "bits": 3}, "3 bits"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point"),
        ({"quant_method": "awq", "group_size": "128"}, "group_size"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "int16"),
        (COMPRESSED | {"format": "float-quantized"}, "float-quantized"),
        (COMPRESSED | {"config_groups": {}}, "config_groups"),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 3, "strategy": "channel"}}}},
            "3 bits",
        ),
        (
            COMPRESSED | {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "tensor"}}}},
            "by tensor",
        ),
        (
            COMPRESSED
            | {
                "config_groups": {
                    "g": {
                        "weights": {"num_bits": 4, "strategy": "channel"},
                        "input_activations": {"num_bits": 8},
                    }
                }
            },
            "activations",
        ),
        ({"quant_method": "mlx", "group_size": 32, "bits": 4, "mode": "mxfp4"}, "mxfp4"),
    ],
)
def test_what_cannot_be_read_is_named(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        detect(entry)


@pytest.mark.parametrize(
    ("layout", "group_size"),
    [
        (name, size)
        for name in LAYOUTS
        for size in (64, -1)
        if name not in PLAIN_FORMATS and (name, size) != ("mlx", -1)
    ],
)
def test_what_is_written_about_a_layout_is_read_as_that_layout(layout: str, group_size: int) -> None:
    entry = entry_of(entry_for(layout, 4, group_size, ["lm_head", "model.layers.0.mlp.gate"]))
    assert entry is not None
    suffixes = LAYOUTS[layout].names
    found = detect(entry, suffixes)
    assert (found.layout, found.bits, found.group_size) == (layout, 4, group_size)


@pytest.mark.parametrize("layout", MIXING)
def test_several_widths_and_group_sizes_are_written_and_read(layout: str) -> None:
    layers = {
        "model.layers.0.self_attn.q_proj": Setting(8, 64),
        "model.layers.0.mlp.experts.0.up_proj": Setting(4, 32),
        "model.layers.0.mlp.experts.11.up_proj": Setting(4, 32),
        "model.layers.1.mlp.experts.0.up_proj": Setting(4, 128),
    }
    written = entry_for(layout, 4, 128, ["lm_head"], layers=layers)
    entry = entry_of(written)
    assert entry is not None
    found = detect(entry)
    assert {name: found.setting(name) for name in layers} == layers
    if layout == "compressed-tensors":
        targets = [group["targets"] for group in entry["config_groups"].values()]
        # The experts of a layer are one pattern, and no class stands in the way of fused layers.
        assert [len(names) for names in targets] == [1, 1, 1]
        assert "Linear" not in {name for names in targets for name in names}


@pytest.mark.parametrize(
    ("layout", "bits"),
    [(name, bits) for name in ("gptq", "gptq_v2", "mlx", "compressed-tensors") for bits in FORMAT_BITS[name]],
)
def test_every_width_of_a_layout_is_written_and_read(layout: str, bits: int) -> None:
    entry = entry_of(entry_for(layout, bits, 64, [], symmetric=True))
    assert entry is not None
    found = detect(entry)
    assert (found.layout, found.bits, found.group_size) == (layout, bits, 64)
    assert found.symmetric is (layout != "mlx")


def test_the_awq_entry_is_what_engines_read() -> None:
    assert entry_for("gemm", 4, 128, ["lm_head"]) == {
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }
    }
    assert entry_for("gemm", 4, 128, [], quantized_head=True)["quantization_config"]["lm_head"] is True


def test_float_layers_are_excepted_in_each_projects_way() -> None:
    skipped = ["model.layers.0.mlp.gate"]
    gptq = entry_for("gptq", 4, 128, ["lm_head", *skipped])["quantization_config"]
    assert gptq["dynamic"] == {r"-:^model\.layers\.0\.mlp\.gate$": {}}
    assert gptq["sym"] is False
    compressed = entry_for("compressed-tensors", 4, 128, skipped)["quantization_config"]
    assert compressed["ignore"] == [*skipped, "lm_head"]
    assert entry_for("float", 4, 128, skipped) == {}

"""What is said of engines is what their limits are; `tests/engines` asks the engines themselves."""

from __future__ import annotations

import pytest

from awq.formats.engines import engine_notes, tensor_parallel
from awq.formats.layout import LayerShape


def layers(hidden: int, inner: int, group: int, prefix: str = "model.layers.0.mlp") -> dict[str, LayerShape]:
    return {
        f"{prefix}.up_proj": LayerShape(inner, hidden, group),
        f"{prefix}.down_proj": LayerShape(hidden, inner, group),
    }


def test_a_model_of_common_sizes_fits_everywhere() -> None:
    assert set(engine_notes(layers(4096, 14336, 128), 128).values()) == {"fits"}


def test_groups_decide_which_engines_a_model_fits() -> None:
    notes = engine_notes(layers(256, 768, 32), 32)
    assert notes["LMDeploy TurboMind"] == "no: it takes groups of 128"
    assert notes["mlx-lm"] == notes["SGLang"] == notes["vLLM (NVIDIA)"] == "fits"
    notes = engine_notes(layers(256, 768, 256), 256)
    assert notes["mlx-lm"] == "no: it takes groups of 32, 64, 128"
    assert "slower kernel" in notes["SGLang"]
    assert "slower kernel" in notes["vLLM (NVIDIA)"]
    assert engine_notes(layers(256, 768, 256), -1)["SGLang"] == "fits"


def test_layers_that_marlin_s_tiles_do_not_cover_are_counted() -> None:
    notes = engine_notes(layers(256, 96, 32), 32)
    assert notes["vLLM (NVIDIA)"] == "fits, 2 layers padded to its tiles: a little slower"
    assert notes["SGLang"] == "fits, 2 layers run by a slower kernel, in float16 alone"
    assert notes["vLLM (CPU)"] == "fits"
    assert "model.layers.0.mlp.up_proj" in engine_notes(layers(256, 72, 8), 8)["vLLM (CPU)"]


def test_an_expert_s_last_layer_has_its_tiles_the_other_way_round() -> None:
    experts = layers(256, 64, 64, "model.layers.0.mlp.experts.3")
    notes = engine_notes(experts, 64)
    assert notes["SGLang"] == "fits"
    assert "AMX" in notes["vLLM (CPU)"]
    assert notes["mlx-lm"].startswith("no")
    assert engine_notes(layers(256, 64, 64), 64)["SGLang"] != "fits"


@pytest.mark.parametrize(
    ("inner", "group", "sizes"),
    [(14336, 128, [2, 4, 8, 16]), (768, 128, [2]), (768, 256, []), (768, 32, [2, 4, 8])],
)
def test_gpus_share_whole_groups(inner: int, group: int, sizes: list[int]) -> None:
    assert tensor_parallel(layers(4096, inner, group)) == sizes


def test_gpus_share_whole_words_of_codes() -> None:
    assert tensor_parallel({"model.layers.0.self_attn.k_proj": LayerShape(48, 256, 128)}) == [2]

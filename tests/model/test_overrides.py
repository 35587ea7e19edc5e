"""Overrides: what they change, what they refuse, and that an added fold is proved like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from awq import QuantConfig, quantize
from awq.errors import ConfigError, MissingFileError, ResumeError, StructureError
from awq.model.overrides import AddedFold, Overrides
from awq.pipeline import structure_of
from zoo import TEXT, build

CONFIG = QuantConfig(group_size=32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build(TEXT["llama"], folder)
    return folder


def kind_of(folder: Path, **overrides: Any) -> dict[str, Any]:
    (kind,) = structure_of(folder, CONFIG, overrides=Overrides.of(overrides))["kinds"]
    return kind


def folds_of(kind: dict[str, Any]) -> dict[str, list[str]]:
    return {fold["producer"]: fold["consumers"] for fold in kind["folds"]}


def test_a_denied_producer_takes_no_scale(llama: Path) -> None:
    kind = kind_of(llama, deny=["self_attn.v_proj"])
    assert set(folds_of(kind)) == {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}
    assert kind["unscaled"] == {"self_attn.o_proj": "overrides deny self_attn.v_proj a scale"}


def test_layers_are_left_float_as_by_modules_to_not_convert(llama: Path) -> None:
    kind = kind_of(llama, leave_float=["mlp.down_proj"])
    assert kind["skipped"] == {"mlp.down_proj": "named in modules_to_not_convert"}


def test_the_list_of_blocks_can_be_named(llama: Path) -> None:
    assert structure_of(llama, CONFIG, overrides=Overrides(blocks="model.layers"))["blocks"] == 2
    with pytest.raises(StructureError, match=r"no list of blocks that is called model\.h"):
        structure_of(llama, CONFIG, overrides=Overrides(blocks="model.h"))


def test_an_added_fold_that_is_right_stands_for_the_discovered_one(
    llama: Path, token_lists: list[list[int]], tmp_path: Path
) -> None:
    """Grouped queries: each of two heads of 16 values is read twice."""
    ours = {"producer": "self_attn.v_proj", "consumers": ["self_attn.o_proj"], "head": 16, "repeat": 2}
    kind = kind_of(llama, fold=[ours])
    (fold,) = (fold for fold in kind["folds"] if fold["producer"] == "self_attn.v_proj")
    assert fold["proved"]
    assert fold["channels"] == 32
    quantize(llama, tmp_path / "found", CONFIG, token_lists, device="cpu")
    quantize(llama, tmp_path / "told", CONFIG, token_lists, device="cpu", overrides={"fold": [ours]})
    found, told = (load_file(tmp_path / name / "model.safetensors") for name in ("found", "told"))
    # The order of the folds is another one; the scale of this one is not.
    name = "model.layers.0.self_attn.o_proj.qweight"
    assert found[name].equal(told[name])


@pytest.mark.parametrize(
    "wrong",
    [
        {"producer": "input_layernorm", "consumers": ["self_attn.q_proj", "self_attn.k_proj"]},
        {
            "producer": "post_attention_layernorm",
            "consumers": ["mlp.gate_proj", "mlp.up_proj"],
            "rule": "one_plus",
        },
        {"producer": "mlp.gate_proj", "consumers": ["mlp.down_proj"]},
        {"producer": "self_attn.v_proj", "consumers": ["self_attn.o_proj"], "head": 32, "repeat": 2},
    ],
)
def test_a_wrong_fold_is_refused_with_the_figure_of_its_proof(
    wrong: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    producer = wrong["producer"]
    words = rf"folding {producer} into .* would change the output of LlamaDecoderLayer by [\d.]+e[+-]\d+, and"
    with pytest.raises(ConfigError, match=words):
        quantize(llama, tmp_path / "out", CONFIG, [[5] * 40], device="cpu", overrides={"fold": [wrong]})
    assert not (tmp_path / "out").exists()


def test_rows_that_do_not_come_out_are_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="32 rows stand for 32 channels, and the consumers read 64"):
        kind_of(llama, fold=[{"producer": "self_attn.v_proj", "consumers": ["self_attn.o_proj"]}])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"deny": ["self_attn.w_proj"]}, r"nothing in the blocks of this model fits self_attn\.w_proj"),
        ({"leave_float": ["w_proj"]}, "nothing in the blocks of this model fits w_proj"),
        ({"fold": [{"producer": "norm", "consumers": ["mlp.up_proj"]}]}, "fits norm → mlp.up_proj"),
        ({"denied": []}, "unexpected keyword argument 'denied'; known are: blocks, leave_float, deny, fold"),
        ({"fold": [{"producer": "norm"}]}, "'consumers'"),
        ({"fold": [{"producer": "norm", "consumers": []}]}, "needs consumers"),
        (
            {"fold": [{"producer": "a", "consumers": ["b"], "rule": "cube"}]},
            "a rule among factor, one_plus, square",
        ),
        ({"deny": "self_attn"}, "deny must be a list of names"),
    ],
)
def test_what_means_nothing_is_refused(value: dict[str, Any], words: str, llama: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        kind_of(llama, **value)


def test_files_of_both_kinds_are_read(tmp_path: Path) -> None:
    expected = Overrides(deny=("a",), fold=(AddedFold("b", ("c", "d"), rows=(0, 8)),))
    (tmp_path / "some.toml").write_text(
        'deny = ["a"]\n\n[[fold]]\nproducer = "b"\nconsumers = ["c", "d"]\nrows = [0, 8]\n'
    )
    (tmp_path / "some.json").write_text(json.dumps(expected.to_dict()))
    assert Overrides.of(tmp_path / "some.toml") == Overrides.of(str(tmp_path / "some.json")) == expected
    with pytest.raises(MissingFileError, match=r"no\.toml"):
        Overrides.of(tmp_path / "no.toml")
    (tmp_path / "broken.toml").write_text("deny = [")
    with pytest.raises(ConfigError, match=r"broken\.toml cannot be read"):
        Overrides.of(tmp_path / "broken.toml")


def test_unfinished_work_is_not_continued_with_other_overrides(llama: Path, tmp_path: Path) -> None:
    from awq.pipeline import Silent

    class Stop(Silent):
        def block_done(self, number: int, report: Any) -> None:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"calib": [[5] * 40], "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        quantize(llama, tmp_path / "out", CONFIG, **arguments, progress=Stop())
    with pytest.raises(ResumeError, match="overrides: "):
        quantize(llama, tmp_path / "out", CONFIG, **arguments, overrides={"deny": ["self_attn.v_proj"]})

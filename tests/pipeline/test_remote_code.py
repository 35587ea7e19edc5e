"""A model that nobody listed, whose code comes with its checkpoint: see `zoo/remote/heron.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import awq
from awq import QuantConfig, quantize
from awq.errors import StructureError
from awq.evaluate.divergence import compare
from awq.pipeline import structure_of
from zoo.remote import heron

CONFIG = QuantConfig(group_size=32)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("remote") / "heron"
    return folder, heron(folder)


@pytest.fixture(scope="module")
def quantized(original: tuple[Path, Any], token_lists: list[list[int]]) -> Path:
    out = original[0].with_name("heron-awq")
    quantize(original[0], out, CONFIG, token_lists, device="cpu", trust_remote_code=True)
    return out


def test_its_structure_is_discovered_whole(original: tuple[Path, Any]) -> None:
    found = structure_of(original[0], CONFIG, trust_remote_code=True)
    assert (found["list"], found["blocks"]) == ("flock", 2)
    (kind,) = found["kinds"]
    folds = {fold["producer"]: fold["consumers"] for fold in kind["folds"] if fold["proved"]}
    assert folds == {
        "first.gain": ["gaze.kvq"],
        "gaze.kvq": ["gaze.back"],
        "second.gain": ["dive"],
        "dive": ["rise"],
    }
    assert not kind["skipped"]
    assert not kind["unscaled"]


def test_its_checkpoint_brings_the_code_along_and_loads(
    original: tuple[Path, Any], quantized: Path, token_lists: list[list[int]]
) -> None:
    from transformers import AutoModelForCausalLM

    assert (quantized / "heron.py").exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(
        quantized, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(isinstance(m, awq.nn.QuantLinear) for m in loaded.modules()) == 8
    ids = torch.tensor(token_lists[0])
    assert compare(loaded, original[1], ids, window=32).kl < 0.05


def test_it_generates_the_same_through_our_loader(quantized: Path) -> None:
    model = awq.load_quantized(quantized, dtype=torch.float32, kernel="torch", trust_remote_code=True)
    ids = torch.tensor([[5, 6, 7]])
    (row,) = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
    with torch.no_grad():
        assert row[3] == model(ids).logits[0, -1].argmax()


def test_it_is_quantized_better_than_by_rounding(
    original: tuple[Path, Any], quantized: Path, token_lists: list[list[int]], tmp_path: Path
) -> None:
    plain = QuantConfig(group_size=32, method="rtn")
    quantize(original[0], tmp_path / "rtn", plain, token_lists, device="cpu", trust_remote_code=True)
    ids = torch.randint(3, 128, (256,), generator=torch.Generator().manual_seed(9))
    ours, theirs = (
        compare(
            awq.load_quantized(folder, dtype=torch.float32, kernel="torch", trust_remote_code=True),
            original[1],
            ids,
            window=32,
        ).kl
        for folder in (quantized, tmp_path / "rtn")
    )
    assert ours < 0.9 * theirs


def test_its_code_is_not_run_unasked(original: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(
        StructureError, match=r"\(heron.py\). Read that code, and allow it .*--trust-remote-code"
    ):
        quantize(original[0], tmp_path / "out", CONFIG, [[5] * 8], device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_block_that_leaks_is_found_among_its_equals(token_lists: list[list[int]], tmp_path: Path) -> None:
    """Both blocks look alike; in the second one a norm's output leaves by another door."""
    heron(tmp_path / "leaking", leak=1)
    notes: list[str] = []

    class Listening(awq.pipeline.Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    report = quantize(
        tmp_path / "leaking",
        tmp_path / "out",
        CONFIG,
        token_lists,
        device="cpu",
        trust_remote_code=True,
        progress=Listening(),
    )
    assert len(report.plan.kinds) == 1
    first, second = (block.outcome["dropped_folds"] for block in report.blocks)
    assert first == {}
    assert list(second) == ["first.gain"]
    assert second["first.gain"] > 0.01
    assert any("flock.1: folding into first.gain dropped" in note for note in notes)
    assert set(report.blocks[1].outcome["scales"]) == {"gaze.kvq", "second.gain", "dive"}
    saved = json.loads((tmp_path / "out" / "awq_report.json").read_text())
    assert saved["blocks"][1]["dropped_folds"] == second


def test_a_model_with_nothing_to_scale_is_offered_plain_rounding(
    token_lists: list[list[int]], tmp_path: Path
) -> None:
    heron(tmp_path / "bare", bare=[0, 1])
    arguments: dict[str, Any] = {"calib": token_lists, "device": "cpu", "trust_remote_code": True}
    with pytest.raises(StructureError, match=r"nothing to scale in 2 x Fishing .*--method rtn"):
        quantize(tmp_path / "bare", tmp_path / "out", CONFIG, **arguments)
    assert not (tmp_path / "out").exists()
    plain = QuantConfig(group_size=32, method="rtn")
    report = quantize(tmp_path / "bare", tmp_path / "out", plain, **arguments)
    assert {block.outcome["chosen"] for block in report.blocks} == {"rtn"}


def test_blocks_with_nothing_to_scale_among_others_are_told_of(
    original: tuple[Path, Any], token_lists: list[list[int]], tmp_path: Path
) -> None:
    heron(tmp_path / "mixed", bare=[1])
    notes: list[str] = []

    class Listening(awq.pipeline.Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    quantize(
        tmp_path / "mixed",
        tmp_path / "out",
        CONFIG,
        token_lists,
        device="cpu",
        trust_remote_code=True,
        progress=Listening(),
    )
    (note,) = notes
    assert note.startswith("nothing to scale in 1 x Fishing (gaze.kvq: no weight of the block comes before")

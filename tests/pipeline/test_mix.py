"""Several widths in one model: what is chosen, what is kept together, what is written and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import awq
from awq import QuantConfig
from awq.config import Setting
from awq.errors import ConfigError
from awq.model.quantized import QuantizedCheckpoint
from awq.pipeline import BlockReport, Plan, quantize
from awq.pipeline.journal import WORK_FOLDER
from awq.pipeline.mix import Unit, choose

IDS = [list(range(3, 43)), list(range(50, 71)), [9, 11, 13]]
QUICK: dict[str, Any] = {"group_size": 32, "scale_steps": 3, "rounding": "nearest"}


@pytest.fixture(scope="module")
def model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three blocks, with large weights in one layer that make its steps wide."""
    folder = tmp_path_factory.mktemp("model")
    made = tiny("llama", num_key_value_heads=2, num_hidden_layers=3)
    made.model.layers[1].mlp.down_proj.weight.data[:, ::32] *= 30
    made.to(torch.float16).save_pretrained(folder)
    return folder


def stored_bits(folder: Path) -> float:
    """Bits on disk of a weight that could have been quantized, on average."""
    checkpoint = QuantizedCheckpoint(folder)
    tensors = checkpoint.reader.tensors
    size = weights = 0
    for layer in checkpoint.layers.values():
        size += sum(tensors[key].bytes for key in layer.keys.values())
        weights += layer.shape.out_features * layer.shape.in_features
    for name in checkpoint.float_linears():
        if ".layers." in name:
            size += tensors[f"{name}.weight"].bytes
            weights += tensors[f"{name}.weight"].bytes // 2
    return size * 8 / weights


@pytest.mark.parametrize(
    ("layout", "target"), [("compressed-tensors", 5.5), ("mlx", 5.5), ("mlx", 4.0), ("gemm", 6.5)]
)
def test_the_checkpoint_takes_what_was_promised_and_is_read_again(
    layout: Any, target: float, model: Path, tmp_path: Path
) -> None:
    report = quantize(model, tmp_path / "out", QuantConfig(format=layout, target_bits=target, **QUICK), IDS)
    mix = report.plan.mix
    assert mix is not None
    assert target - 0.6 < mix["bits"] <= target
    assert stored_bits(tmp_path / "out") == pytest.approx(mix["bits"], abs=1e-9)
    checkpoint = QuantizedCheckpoint(tmp_path / "out")
    found = {name: (layer.bits, layer.shape.group_size) for name, layer in checkpoint.layers.items()}
    assert found == mix["layers"]
    kinds = set(found.values())
    assert kinds == {(4, 32)} if layout == "gemm" else len(kinds) > 1
    # What engines fuse is alike.
    for block in range(3):
        for siblings in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            held = {found.get(name) for name in _of(block, siblings, found, report.plan.skipped)}
            assert len(held) == 1
    loaded = awq.load_quantized(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([IDS[0]])
    with torch.no_grad():
        logits = loaded(ids).logits
        torch.testing.assert_close(logits, loaded.dequantize()(ids).logits, rtol=1e-4, atol=1e-4)


def _of(block: int, leaves: tuple[str, ...], *named: Any) -> list[str]:
    names = {name for part in named for name in part if f".{block}." in name}
    return [name for name in sorted(names) if name.endswith(leaves)]


def test_more_bits_lessen_the_error_and_go_where_it_is_largest(model: Path, tmp_path: Path) -> None:
    errors = []
    for target in (4.6, 5.5, 7.0):
        config = QuantConfig(format="compressed-tensors", target_bits=target, **QUICK)
        report = quantize(model, tmp_path / str(target), config, IDS)
        errors.append(sum(block.outcome["error"] for block in report.blocks))
        assert report.plan.mix is not None
        eights = [name for name, held in report.plan.mix["layers"].items() if held.bits == 8]
        if target == 5.5:
            assert "model.layers.1.mlp.down_proj" in eights
            assert "model.layers.0.mlp.down_proj" not in eights
    assert errors == sorted(errors, reverse=True)


def test_the_experts_of_a_layer_are_alike(tiny: Any, tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    tiny("qwen3_moe", **sizes).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    config = QuantConfig(format="compressed-tensors", target_bits=6.0, **QUICK)
    quantize(tmp_path / "model", tmp_path / "out", config, IDS)
    checkpoint = QuantizedCheckpoint(tmp_path / "out")
    for block in range(2):
        experts = [name for name in checkpoint.layers if f".{block}.mlp.experts." in name]
        held = {(checkpoint.layers[name].bits, checkpoint.layers[name].shape.group_size) for name in experts}
        assert len(experts) in (0, 12)
        assert len(held) <= 1
    assert len({layer.bits for layer in checkpoint.layers.values()}) > 1
    awq.load_quantized(tmp_path / "out")


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


class KillBehindFirstBlock:
    """A progress that ends the run, and remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def planned(self, plan: Plan) -> None:
        pass

    def block_done(self, number: int, report: BlockReport) -> None:
        raise Killed

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_a_killed_run_keeps_its_choices_and_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    config = QuantConfig(format="mlx", target_bits=5.0, **QUICK)
    quantize(model, tmp_path / "straight", config, IDS)
    first, second = KillBehindFirstBlock(), KillBehindFirstBlock()
    for progress in (first, second):
        with pytest.raises(Killed):
            quantize(model, tmp_path / "out", config, IDS, progress=progress)
    # Nothing is measured twice.
    assert any("measuring" in note for note in first.notes)
    assert not any("measuring" in note for note in second.notes)
    assert json.loads((tmp_path / "out" / WORK_FOLDER / "journal.json").read_text())["mix"]["bits"] <= 5
    quantize(model, tmp_path / "out", config, IDS)
    for name in ("model.safetensors", "config.json", "awq_report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_the_report_has_the_seconds_that_choosing_took_apart_from_the_others(
    model: Path, tmp_path: Path
) -> None:
    config = QuantConfig(format="mlx", target_bits=5.0, **QUICK)
    seconds = quantize(model, tmp_path / "mixed", config, IDS).seconds
    assert seconds["mix"] > 0
    assert sum(value for stage, value in seconds.items() if stage != "total") <= seconds["total"]
    plain = quantize(model, tmp_path / "plain", QuantConfig(format="mlx", **QUICK), IDS)
    assert "mix" not in plain.seconds


def test_a_budget_below_the_smallest_settings_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path
) -> None:
    config = QuantConfig(target_bits=4.2, **QUICK)
    with pytest.raises(ConfigError, match=r"target_bits=4\.2: .* take 4\.625 bits"):
        quantize(model, tmp_path / "out", config, IDS)
    assert not (tmp_path / "out").exists()


def test_a_unit_that_no_setting_fits_stays_float() -> None:
    small = Unit(("a",), 64, 128, {Setting(4, 32): 1.0}, {Setting(4, 32): 36})
    odd = Unit(("b",), 64, 128, {}, {})
    mix = choose([[small, odd]], 10.5)
    assert mix.blocks == [{"a": Setting(4, 32)}]
    assert mix.bits == pytest.approx((36 + 128) * 8 / 128)

"""The tree of `awq inspect` on float models: kinds, folds with their readers, what is left out and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zoo import TEXT, build
from zoo.remote import heron


def lines_of(text: str) -> list[str]:
    return [line.strip(" │├└─") for line in text.splitlines()]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    build(TEXT["qwen3_next"], folder)
    return folder


def test_kinds_of_block_and_alike_experts_share_their_lines(awq: Any, mixture: Path) -> None:
    done = awq("inspect", mixture, "--group-size", 32)
    assert done.code == 0, done.err
    lines = lines_of(done.out)
    assert [line for line in lines if line.startswith("Qwen3NextDecoderLayer")] == [
        "Qwen3NextDecoderLayer x 1, block 0",
        "Qwen3NextDecoderLayer x 1, block 1",
    ]
    for line in (
        "mlp.experts.*.gate_proj  32 x 64 (x 4)",
        "mlp.shared_expert_gate  1 x 64  stays float",
        "mlp.shared_expert_gate: 1 output channels do not divide by 8",
        "linear_attn.conv1d.weight: Conv1d, 256 x 1 x 4",
    ):
        assert line in lines, done.out
    assert any(line.startswith("mlp.experts.*.up_proj (x 4) scales 32 channels") for line in lines)
    assert any("a norm that applies 1 + w" in line for line in lines)


def test_what_cannot_be_scaled_says_why(awq: Any, tmp_path: Path) -> None:
    build(TEXT["olmo2"], tmp_path)
    done = awq("inspect", tmp_path, "--group-size", 32)
    words = " ".join(lines_of(done.out))
    assert "quantized without a scale self_attn.q_proj: no weight of the block comes before it" in words
    assert "mlp.up_proj: its input channels are no plain factors of post_attention_layernorm" in words


def test_a_dropped_fold_is_shown_with_the_change_it_would_make(awq: Any, tmp_path: Path) -> None:
    heron(tmp_path / "leaking", leak=0)
    done = awq("inspect", tmp_path / "leaking", "--group-size", 32, "--trust-remote-code")
    words = " ".join(lines_of(done.out))
    assert "first.gain scales 64 channels: dropped, the output would change by" in words
    figures = awq(
        "inspect", tmp_path / "leaking", "--group-size", 32, "--trust-remote-code", "--json", "-"
    ).json
    assert figures["outside"] == ["voice"]
    (kind,) = figures["kinds"]
    assert kind["shapes"]["gaze.kvq"] == [128, 64]
    (dropped,) = (fold for fold in kind["folds"] if not fold["proved"])
    assert dropped["change"] > 0.01
    assert "folding into first.gain would change the output by" in kind["unscaled"]["gaze.kvq"]

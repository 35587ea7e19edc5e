"""`awq bench`: two models by turns, sizes that do not fit left out, figures for people and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--decode", 2, "--repeats", 1)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    from awq.evaluate import speed

    real = speed.copy_bandwidth
    monkeypatch.setattr("awq.evaluate.copy_bandwidth", lambda device: real(device, megabytes=8, repeats=2))


def test_it_measures_a_model_beside_another_at_each_size(awq: Any, original: Path, quantized: Path) -> None:
    done = awq(
        "bench",
        quantized,
        "--against",
        original,
        "--batch",
        "1,2",
        "--prefill",
        "8,999",
        *QUICK,
        "--json",
        "-",
    )
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert [(row["batch"], row["prefill"], row["model"]) for row in rows] == [
        (batch, 8, str(folder)) for batch in (1, 2) for folder in (original, quantized)
    ]
    for row in rows:
        assert row["decode_speed"]["median"] > 0
        assert row["read_speed"] == pytest.approx(row["read"] * row["decode_speed"]["median"] / row["batch"])
    assert rows[1]["weights"] < rows[0]["weights"]
    assert done.json["copy_bandwidth"] > 0
    ratio = rows[1]["decode_speed"]["median"] / rows[0]["decode_speed"]["median"]
    assert f"{ratio:.2f}x" in done.err
    for speed in (rows[3]["prefill_speed"], rows[3]["decode_speed"]):
        low, high = (f"{n:.1f}" if n < 100 else f"{n:.0f}" for n in (speed["low"], speed["high"]))
        assert f"{low}-{high}" in done.err
    assert "left out, because the context ends at 128: prompts of 999" in done.err


def test_what_was_measured_before_an_interruption_is_in_the_file(
    awq: Any, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from awq.evaluate import throughput

    def until_the_second(models: Any, batch: int, *sizes: int) -> Any:
        if batch == 2:
            raise MemoryError
        return throughput(models, batch, *sizes)

    monkeypatch.setattr("awq.evaluate.throughput", until_the_second)
    file = tmp_path / "figures.json"
    with pytest.raises(MemoryError):
        awq("bench", quantized, "--batch", "1,2", "--prefill", 8, *QUICK, "--json", file)
    assert [row["batch"] for row in json.loads(file.read_text())["rows"]] == [1]


def test_a_kernel_can_be_insisted_on(awq: Any, quantized: Path) -> None:
    done = awq("bench", quantized, "--batch", 1, "--prefill", 4, "--kernel", "torch", *QUICK)
    assert done.code == 0, done.err
    done = awq("bench", quantized, "--batch", 1, "--prefill", 4, "--kernel", "warp", *QUICK)
    assert done.code == 1
    assert "kernel 'warp' is unknown" in done.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--batch", "1,x"), "--batch takes whole numbers"),
        (("--prefill", "0"), "--prefill takes whole numbers"),
        (("--decode", 0), "at least 1"),
        (("--prefill", 4000), "fit the model's context of 128"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: tuple[Any, ...], told: str, awq: Any, quantized: Path
) -> None:
    done = awq("bench", quantized, *options)
    assert done.code == 1
    assert told in done.err


def test_fused_models_are_measured_and_read_the_bytes_that_they_have(
    awq: Any, original: Path, quantized: Path
) -> None:
    sizes = ("--batch", 1, "--prefill", 4, *QUICK, "--json", "-")
    plain = awq("bench", quantized, "--against", original, *sizes)
    fused = awq("bench", quantized, "--against", original, "--fuse", *sizes)
    assert fused.code == 0, fused.err
    (_, one), (_, other) = ([row["read"] for row in found.json["rows"]] for found in (plain, fused))
    assert 0.9 * one < other <= one  # rows of layers apart are filled up to 64


def test_the_head_of_quantized_models_can_be_rounded(awq: Any, original: Path, quantized: Path) -> None:
    sizes = ("--batch", 1, "--prefill", 4, *QUICK, "--json", "-")
    plain = awq("bench", quantized, "--against", original, *sizes)
    rounded = awq("bench", quantized, "--against", original, "--head-bits", 8, *sizes)
    assert rounded.code == 0, rounded.err
    rows = list(zip(plain.json["rows"], rounded.json["rows"], strict=True))
    assert rows[0][0]["read"] == rows[0][1]["read"]
    assert rows[1][0]["read"] > rows[1][1]["read"]
    refused = awq("bench", quantized, "--head-bits", 5, *sizes)
    assert refused.code == 1
    assert "head_bits=5: a head is rounded to 8 bits" in refused.err

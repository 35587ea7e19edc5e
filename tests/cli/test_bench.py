"""`awq bench`: two models by turns, sizes that do not fit left out, figures for people and as JSON."""

from __future__ import annotations

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
    assert "tok/s" in done.err
    assert "left out, because the context ends at 128: prompts of 999" in done.err


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

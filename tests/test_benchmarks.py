"""The benchmarks that people run to check our figures run at all, and their figures belong together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_kernels_are_measured_beside_the_dense_product(tmp_path: Path) -> None:
    target = tmp_path / "kernels.json"
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--device", "cpu", "--layer", "64x128"]
    command += ["--group", "32", "--rows", "1", "5", "--rounds", "4", "--cold", "1", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    written = json.loads(target.read_text())
    names = {row["kernel"] for row in written["figures"]}
    assert {"torch", "cpu-int4", "dense bfloat16", "dense float32"} <= names
    assert {(row["rows"], row["kernel"]) for row in written["figures"]} == {
        (rows, name) for rows in (1, 5) for name in names
    }
    for row in written["figures"]:
        low, high = row["quartiles_ms"]
        assert 0 < row["fastest_ms"] <= low <= row["median_ms"] <= high
        assert row["of_copy"] == pytest.approx(row["bytes"] / row["median_ms"] * 1e3 / written["copy"])
        assert row["times_dense"] == 1 or row["kernel"] != "dense bfloat16"
        assert row["kernel"] in done.stdout


def test_fused_decoding_is_measured_beside_layers_apart(tmp_path: Path) -> None:
    target = tmp_path / "fused.json"
    command = [sys.executable, str(BENCHMARKS / "fused.py"), "--samples", "1", "--windows", "2"]
    command += ["--rounds", "2", "--new", "3", "--batch", "2", "--cache", "64", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    ((name, found),) = json.loads(target.read_text())["rounds"].items()
    assert name.endswith("on cpu, batch 2")
    assert {model: len(speeds) for model, speeds in found.items()} == dict.fromkeys(
        ("apart", "merged", "static 64"), 2
    )
    assert all(speed > 0 for speeds in found.values() for speed in speeds)


@pytest.mark.slow
def test_the_script_for_two_gpus_runs_where_there_is_none(tmp_path: Path) -> None:
    target = tmp_path / "multi.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_multi.py"), "--device", "cpu", "--other", "cpu"]
    command += ["--blocks", "0", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())["bundled"]
    assert found["quantized on"] == "cpu"
    assert "device_map gives no place to" in found["refused"]
    ways = {name: way for name, way in found["ways"].items() if "one device" not in name}
    assert {name.split(": ")[1] for name in ways} == {"by blocks", "fused", "transformers"}
    assert all(way["same tokens"] and way["right"] for way in ways.values())

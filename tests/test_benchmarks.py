"""The benchmarks that people run to check our figures run at all, and their figures belong together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from awq.calibration.sources import bundled_text
from awq.kernels import cpu_native

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


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    return done


def test_a_token_is_measured_for_each_way_to_load_a_model(tmp_path: Path) -> None:
    target = tmp_path / "token.json"
    sizes = ("--layers", "1", "--hidden", "128", "--intermediate", "128", "--vocabulary", "500")
    few = ("--prompt", "4", "--decode", "2", "--rounds", "2", "--ways", "as it is", "fuse, head_bits=8")
    run("cpu_token.py", *sizes, *few, "--json", str(target))
    found = json.loads(target.read_text())["seconds"]
    assert {name: len(times) for name, times in found.items()} == {"as it is": 2, "fuse, head_bits=8": 2}
    assert all(seconds > 0 for times in found.values() for seconds in times)


@pytest.mark.skipif(isinstance(cpu_native.load(), str), reason="needs the C++ products")
def test_parts_of_a_token_are_measured_beside_pytorchs(tmp_path: Path) -> None:
    target = tmp_path / "parts.json"
    few = (
        "--heads",
        "4",
        "--groups",
        "2",
        "--channels",
        "64",
        "--size",
        "16",
        "--rounds",
        "2",
        "--lengths",
        "9",
    )
    done = run("cpu_parts.py", *few, "--json", str(target))
    found = json.loads(target.read_text())["seconds"]
    assert list(found) == [f"{n}, {d}" for d in ("bfloat16", "float32") for n in ("norm", "attention to 9")]
    for pairs in found.values():
        assert [[len(times) for times in pair] for pair in pairs] == [[2, 2], [2, 2]]
    assert "attention to 9, float32" in done.stdout


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options of the studies that make their work small: the bundled model, with a text of a few pages."""
    text = tmp_path / "text.txt"
    text.write_text(bundled_text("evaluation")[:20_000])
    model = resources.files("awq").joinpath("data/books6m")
    options = ["--without-bundled", "--model", f"{model}:{text}:{text}", "--windows", "2"]
    return [*options, "--seq-len", "32", "--json", str(tmp_path / "figures.json")]


@pytest.mark.slow
def test_the_study_puts_its_ingredients_in_place(small: list[str], tmp_path: Path) -> None:
    names = ["plain rounding", "plain rounding, biases corrected", "scales alone"]
    names += ["scales alone, exact outputs"]
    command = [sys.executable, str(BENCHMARKS / "study.py"), "--variants", ";".join(names), *small]
    done = subprocess.run([*command, "--samples", "2", "--used", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = (runs for title, runs in json.loads(Path(small[-1]).read_text()).items() if "W4" in title)
    assert list(found) == names
    kl = {name: [run["texts"]["own text"]["kl"] for run in runs] for name, runs in found.items()}
    assert all(len(each) == 1 and min(each) > 0 for each in kl.values())
    # One that was never reached would change nothing.
    assert len({tuple(each) for each in kl.values()}) == len(names)


@pytest.mark.slow
def test_the_study_of_calibration_takes_what_its_rows_say(small: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(bundled_text("calibration")[:20_000])
    command = [sys.executable, str(BENCHMARKS / "study_calibration.py"), "--calib", f"other:{other}", *small]
    command += ["--shapes", "9999x32", "--used", "4", "--presets", "fast"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = (rows for title, rows in json.loads(Path(small[-1]).read_text()).items() if "fast" in title)
    rows = ["4 x 32, own", "4 x 32, other", "4 x 32, own + other"]
    assert list(found) == rows
    kl = [run["texts"]["own text"]["kl"] for runs in found.values() for run in runs]
    assert len(set(kl)) == 2 * len(rows)
    assert "9999 x 32, own: the text is too short" in done.stdout


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

"""The wheel: pure Python, with the model it ships and without the tests."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import awq

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the backend itself: no environment of its own is made, and nothing is fetched."""
    pytest.importorskip("hatchling", reason="the build backend is in the `test` extra")
    out = tmp_path_factory.mktemp("wheel")
    script = f"from hatchling.build import build_wheel; build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (file,) = out.iterdir()
    return file


def test_it_is_for_any_python_3_on_any_machine(wheel: Path) -> None:
    assert wheel.name == f"openawq-{awq.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".pyd", ".dylib", ".pyc"))]


def test_it_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    there = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == there
    for name in ("books6m/model.safetensors", "books6m/tokenizer.json", "calibration.txt", "evaluation.txt"):
        assert f"awq/data/{name}" in held


def test_it_tells_its_command_its_licence_and_its_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        names = archive.namelist()
        points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "awq = awq.cli.main:run" in points
    assert any(name.endswith("/LICENSE") for name in names)
    assert "Requires-Python: >=3.10" in metadata
    needs = {
        line.split()[1].split(">")[0] for line in metadata.splitlines() if line.startswith("Requires-Dist")
    }
    assert {"torch", "transformers", "accelerate", "safetensors", "typer", "rich"} <= needs

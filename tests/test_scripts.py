"""The scripts that make environments say what went wrong, and leave nothing that looks ready."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are written for bash")


def engines(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `scripts/engines` of a small repository of its own, where pip may not use the network."""
    environment = os.environ | {"AWQ_ENGINE_PYTHON": sys.executable, "AWQ_ENGINE_PIP_OPTIONS": "--no-index"}
    environment.pop("PIP_FIND_LINKS", None)
    command = ["bash", str(place / "scripts/engines"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/engines", tmp_path / "scripts")
    (tmp_path / "tests/engines").mkdir(parents=True)
    (tmp_path / "tests/engines/requirements-empty.txt").write_text("# nothing\n")
    (tmp_path / "tests/engines/requirements-lost.txt").write_text("no-package-has-this-name==1.0\n")
    return tmp_path


@pytest.mark.slow
def test_an_engine_that_cannot_be_made_is_named_and_the_others_are_made(place: Path) -> None:
    done = engines(place, "lost", "empty")
    assert done.returncode == 1
    assert "no-package-has-this-name" in done.stderr
    assert "lost: FAILED after" in done.stderr
    assert done.stderr.splitlines()[-1] == "not made: lost"
    line = f"export AWQ_ENGINE_EMPTY={place}/.engines/empty/bin/python\n"
    assert done.stdout == (place / ".engines/env.sh").read_text() == line


@pytest.mark.slow
def test_an_environment_that_is_ready_is_used_again_until_its_requirements_change(place: Path) -> None:
    assert "empty: made in" in engines(place, "empty").stderr
    assert engines(place, "empty").stderr == "empty: ready\n"
    (place / "tests/engines/requirements-empty.txt").write_text("# nothing else\n")
    assert "empty: made in" in engines(place, "empty").stderr


def test_an_unknown_engine_is_answered_with_those_that_are_known(place: Path) -> None:
    done = engines(place, "nonsense")
    assert done.returncode == 2
    assert "no engine is named nonsense; known are: empty lost" in done.stderr


def test_every_suite_of_an_engine_names_tests_that_exist() -> None:
    for suite in (ROOT / "tests/engines").glob("suite-*.txt"):
        name = suite.stem.removeprefix("suite-")
        assert (ROOT / f"tests/engines/requirements-{name}.txt").exists()
        paths = [line for line in suite.read_text().splitlines() if not line.startswith("#")]
        assert paths and all((ROOT / path).exists() for path in paths)


def test_continuous_integration_names_engines_that_exist() -> None:
    (names,) = [
        line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("for name in")
    ]
    for name in names.removeprefix("for name in ").removesuffix("; do").split():
        assert (ROOT / f"tests/engines/requirements-{name}.txt").exists()

"""The comparison with other quantizers: rows come from checkpoints; a peer that fails is shown as failed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TITLE = "books6m W4 g128"
SMALL = ("--samples", "2", "--seq-len", "32", "--windows", "2", "--threads", "1")


@pytest.fixture
def peer_environments(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_environments

    return peer_environments


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The rows of one run, added to a file that held one already, and what was printed."""
    folder = tmp_path_factory.mktemp("peers")
    target = folder / "peers.json"
    target.write_text(json.dumps({"rows": {TITLE: {"best": {"error": "measured earlier"}}}}))
    # A Python that finds no mlx, like an environment whose installation went wrong.
    python = folder / "mlx" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, str(BENCHMARKS / "peers.py"), "--samples", "8", "--seq-len", "64"]
    command += ["--windows", "2", "--threads", "1", "--only", "rtn", "balanced", "autoawq", "mlx-gptq"]
    command += ["--environments", str(folder), "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text())["rows"][TITLE], done.stdout


@pytest.mark.slow
def test_rows_are_measured_on_their_own_checkpoints(measured: Any) -> None:
    rows, printed = measured
    assert 0 < rows["balanced"]["divergence"]["kl"] < rows["rtn"]["divergence"]["kl"]
    for name in ("rtn", "balanced"):
        assert rows[name]["error"] is None
        assert f"{rows[name]['divergence']['kl']:.5f}" in printed
        # Codes, a 16-bit scale and a 4-bit zero point for each 128 weights.
        assert rows[name]["bits"] == pytest.approx(4 + 20 / 128)
        assert 0 < rows[name]["quantizing"] < rows[name]["whole"]
        assert rows[name]["peak"] > 1e8


@pytest.mark.slow
def test_rows_that_were_measured_earlier_stay(measured: Any) -> None:
    rows, printed = measured
    assert rows["best"] == {"error": "measured earlier"}
    assert "OpenAWQ best: measured earlier" in printed


@pytest.mark.slow
def test_a_peer_without_an_environment_is_told_how_to_get_one(measured: Any) -> None:
    rows, printed = measured
    assert "no environment; make it with --install" in rows["autoawq"]["error"]
    assert "autoawq/bin/python -m pip install" in rows["autoawq"]["error"]
    assert rows["autoawq"]["error"] in printed


@pytest.mark.slow
def test_a_worker_that_fails_leaves_its_error_in_its_row(measured: Any) -> None:
    rows, printed = measured
    assert rows["mlx-gptq"]["error"] == "ModuleNotFoundError: No module named 'job' (exit status 1)"
    assert "divergence" not in rows["mlx-gptq"]
    assert rows["mlx-gptq"]["error"] in printed


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("", "no word why"),
        ("usage: x\nx: error: no such option\n", "x: error: no such option"),
        (
            "Traceback (most recent call last):\n  File 'a', line 1\nOSError: no such file\n\n"
            "During handling of the above exception, another exception occurred:\n\n"
            "Traceback (most recent call last):\n  File 'b', line 2\n    pin()\n"
            "RuntimeError: Need to provide pin_memory allocator\nINFO  closing\n",
            "RuntimeError: Need to provide pin_memory allocator",
        ),
        (
            " 10%|# | 1/6\r 20%|## | 2/6\rTraceback (most recent call last):\n  File 'a'\n"
            "torch.cuda.OutOfMemoryError: 1 GiB\n 20%|## | 2/6\r",
            "torch.cuda.OutOfMemoryError: 1 GiB",
        ),
    ],
)
def test_the_error_of_a_log_is_found(peer_environments: Any, log: str, sentence: str) -> None:
    assert peer_environments.last_error(log) == sentence


def test_the_commands_for_an_environment_install_what_its_files_name(peer_environments: Any) -> None:
    made = [" ".join(line) for line in peer_environments.commands("autoawq", Path("there"))]
    assert made[0].endswith("-m venv --clear there/autoawq")
    assert made[1].endswith("torch==2.13.0")
    assert made[-1].endswith(
        "--no-deps --requirement " + str(BENCHMARKS / "peer_workers/no-deps-autoawq.txt")
    )


def test_pip_gets_the_options_that_the_environment_names(
    peer_environments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWQ_ENGINE_PIP_OPTIONS", "--no-index --find-links 'a folder'")
    _, *installs = peer_environments.commands("mlx", Path("there"))
    for command in installs:
        assert command[command.index("--no-index") :][:3] == ["--no-index", "--find-links", "a folder"]


@pytest.mark.slow
def test_an_environment_is_made_once_and_anew_when_it_is_not_what_is_asked_for(
    peer_environments: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peer_environments, "WORKERS", tmp_path)
    monkeypatch.setenv("AWQ_ENGINE_PIP_OPTIONS", "--no-index")
    requirements, mark = tmp_path / "requirements-mlx.txt", tmp_path / "mlx" / "mark"

    def installed() -> Any:
        return peer_environments.prepare(["mlx"], tmp_path, install=True)

    requirements.write_text("# nothing\n")
    assert installed() == {}
    mark.touch()
    assert installed() == {}
    assert mark.exists()
    requirements.write_text("a-package-that-nobody-has==1\n")
    assert "No matching distribution found for a-package-that-nobody-has==1" in installed()["mlx"]
    assert not mark.exists()
    assert peer_environments.python_of("mlx", tmp_path).exists()  # half made, which is not enough
    assert "a-package-that-nobody-has" in installed()["mlx"]
    requirements.write_text("# nothing\n")
    assert installed() == {}


def test_a_folder_that_is_no_environment_is_left_alone(peer_environments: Any, tmp_path: Path) -> None:
    letter = tmp_path / "mlx" / "letter"
    letter.parent.mkdir()
    letter.touch()
    told = peer_environments.prepare(["mlx"], tmp_path, install=True)
    assert "is no virtual environment" in told["mlx"]
    assert letter.exists()


def test_seconds_of_quantizing_leave_imports_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peer_workers"))
    monkeypatch.syspath_prepend(str(tmp_path))
    from job import Job

    (tmp_path / "lazily_imported.py").write_text("import lazily_imported_too\n")
    (tmp_path / "lazily_imported_too.py").write_text("import time\ntime.sleep(0.5)\n")
    (tmp_path / "samples.json").write_text("[[1]]")
    asked = {"model": "", "out": "", "samples": str(tmp_path / "samples.json")}
    (tmp_path / "job.json").write_text(json.dumps({**asked, "bits": 4, "group_size": 128, "options": {}}))
    job = Job(tmp_path)
    with job.quantizing():
        time.sleep(0.2)
        importlib.import_module("lazily_imported")
    job.finish()
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert 0.2 <= answer["quantizing"] < 0.7  # it is more than that with the import
    assert answer["importing"] >= 0.5
    assert 0 <= answer["processor"] < 0.2


def test_every_row_has_a_worker_and_every_peer_an_environment(peer_environments: Any) -> None:
    import peer_rows

    for row in peer_rows.ROWS.values():
        assert (peer_environments.WORKERS / f"with_{row.peer}.py").exists()
        if row.peer != peer_environments.OURS:
            assert peer_environments.commands(row.peer, Path("there"))

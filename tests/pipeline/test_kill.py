"""`kill -9` for real: processes that run the command line die at any moment, and the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from awq.pipeline.journal import WORK_FOLDER, is_finished

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
BLOCKS = 6

# Imports take seconds and die like anything else; so that many kills fit a test, a process imports once and
# forks one child for each command line it is given. It tells the child's id, and then how it ended.
FORKS = """
import json, os, sys
import torch, transformers.models.llama.modeling_llama, accelerate, awq.hf, awq.pipeline, awq.cli.main
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.argv = json.loads(line)
        awq.cli.main.run()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Starts `awq` in processes of its own."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, bufsize=1,
        )  # fmt: skip
        self._answer("ready")

    def _answer(self, expected: str = "") -> str:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            # A child's own words arrive on the same stream.
            if line.strip().lstrip("-").isdigit() or (expected and line.strip() == expected):
                return line.strip()
        raise AssertionError("the forking process ended")

    def start(self, arguments: list[str]) -> int:
        """Start a command line; its process id."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(["awq", *arguments]) + "\n")
        return int(self._answer())

    def end(self) -> int:
        """Exit code of what was started, or the negative number of the signal that ended it."""
        return int(self._answer())

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def place(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and calibration ids."""
    place = tmp_path_factory.mktemp("kill")
    model = tiny("llama", num_key_value_heads=2, num_hidden_layers=BLOCKS)
    model.save_pretrained(place / "model", max_shard_size="100KB")
    ids = random.Random(0)
    rows = [[ids.randrange(3, 128) for _ in range(length)] for length in (40, 40, 31, 17, 40, 2)]
    (place / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def command(place: Path, out: Path) -> list[str]:
    model, ids = str(place / "model"), str(place / "ids.jsonl")
    return ["quantize", model, str(out), "--group-size", "32", "--calib", ids]


@pytest.fixture(scope="module")
def unbroken(place: Path, runs: Runs) -> dict[str, bytes]:
    """The files of an unbroken run."""
    runs.start(command(place, place / "unbroken"))
    assert runs.end() == 0
    return contents(place / "unbroken")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def blocks_done(out: Path) -> int:
    """Blocks in the journal, or -1 before there is one."""
    try:
        return len(json.loads((out / WORK_FOLDER / "journal.json").read_text())["blocks"])
    except FileNotFoundError:
        return -1


def wait_for_blocks(out: Path, number: int, running: Callable[[], bool]) -> None:
    """Wait until the journal shows some blocks, or the run has ended."""
    deadline = time.monotonic() + 120
    while blocks_done(out) < number and running():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def assert_same(out: Path, unbroken: dict[str, bytes]) -> None:
    left = contents(out)
    left.pop(f"{WORK_FOLDER}/lock", None)  # an empty file, if a kill came before the very last step
    assert left == unbroken


@pytest.mark.parametrize("number", [0, 1, 3, BLOCKS])
def test_a_run_killed_when_its_journal_shows_some_blocks_continues_to_the_same_bytes(
    number: int, place: Path, runs: Runs, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = runs.start(command(place, out))
    wait_for_blocks(out, number, lambda: alive(process))
    kill(process)
    ended = runs.end()
    if not is_finished(out):  # behind the last block little is left, and may be done already
        assert ended == -signal.SIGKILL
        assert number == BLOCKS or not (out / "config.json").exists()
        runs.start(command(place, out))
        assert runs.end() == 0
    else:
        assert number == BLOCKS
    assert_same(out, unbroken)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_again_and_again_at_random_times_ends_with_the_same_bytes(
    seed: int, place: Path, runs: Runs, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    moments, out = random.Random(seed), tmp_path / "out"
    # Behind a few blocks more each time, or before there is a journal, and then a moment later.
    for blocks in (moments.choice([-1, 0, 1]), moments.choice([-1, 2, 3]), 4, BLOCKS):
        process = runs.start(command(place, out))
        wait_for_blocks(out, blocks, lambda process=process: alive(process))
        time.sleep(moments.uniform(0, 0.1))
        kill(process)
        ended = runs.end()
        if is_finished(out):  # possible the last time only
            assert blocks == BLOCKS
            break
        assert ended == -signal.SIGKILL
    else:
        runs.start(command(place, out))
        assert runs.end() == 0
    assert_same(out, unbroken)


def as_in_a_terminal() -> None:
    """A shell's background job is born with Ctrl-C ignored, and hands that down to its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_for_real(place: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "awq.cli.main", *command(place, out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_as_a_person_starts_it_survives_a_kill_and_an_interruption(
    place: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start_for_real(place, out)
    wait_for_blocks(out, 1, lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL

    process = start_for_real(place, out)
    wait_for_blocks(out, 3, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)  # Ctrl-C
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; a quantization continues when the same command is run again" in errors
    assert "Traceback" not in errors

    process = start_for_real(place, out)
    told, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "blocks were done before" in told
    assert contents(out) == unbroken


@pytest.mark.slow
def test_a_demo_killed_between_its_two_quantizations_goes_on_with_the_second(tmp_path: Path) -> None:
    demo = [sys.executable, "-m", "awq.cli.main", "demo", "--samples", "4", "--windows", "2"]
    demo += ["--out", str(tmp_path / "out")]
    first, second = tmp_path / "out/rtn", tmp_path / "out/awq"

    def killed_when_finished(folder: Path) -> str:
        process = subprocess.Popen(demo, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not is_finished(folder) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        told, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, told
        return told

    killed_when_finished(first)
    assert not (second / "config.json").exists()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert f"{first} is finished already" in killed_when_finished(second)
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before

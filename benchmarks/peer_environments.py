"""The environments of the peers that `peers.py` measures: one for each `peer_workers/requirements-NAME.txt`.

Packages whose own requirements ask for a GPU are named in `no-deps-NAME.txt` and installed without them.
`AWQ_ENGINE_PIP_OPTIONS` has more options for pip, as for `scripts/engines`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from common import console

WORKERS = Path(__file__).with_name("peer_workers")
OURS = "openawq"


def python_of(peer: str, environments: Path) -> Path:
    """The Python that runs a peer's worker; ours is the one that runs this."""
    return Path(sys.executable) if peer == OURS else environments / peer / "bin" / "python"


def commands(peer: str, environments: Path) -> list[list[str]]:
    """What makes a peer's environment."""
    venv = environments / peer
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += shlex.split(os.environ.get("AWQ_ENGINE_PIP_OPTIONS", ""))
    listed, alone = _requirements(peer)
    # torch goes first: packages that name it without a version then find it.
    torch = [line for line in listed.read_text().splitlines() if line.startswith("torch==")]
    found = [[sys.executable, "-m", "venv", "--clear", str(venv)]]
    found += [[*pip, line] for line in torch]
    found += [[*pip, "--requirement", str(listed)]]
    if alone.exists():
        found += [[*pip, "--no-deps", "--requirement", str(alone)]]
    return found


def prepare(peers: list[str], environments: Path, install: bool) -> dict[str, str]:
    """Make the environments that are missing, half made, or of other requirements; or tell how.

    An environment that somebody made by hand is run as it is, unless it is to be installed.

    Returns:
        Why a peer cannot be run, for those that cannot.
    """
    missing: dict[str, str] = {}
    for peer in peers:
        if peer == OURS:
            continue
        if install:
            if error := _made(peer, environments):
                missing[peer] = error
        elif not python_of(peer, environments).exists():
            lines = map(shlex.join, commands(peer, environments))
            missing[peer] = "no environment; make it with --install, or: " + " && ".join(lines)
    return missing


def _made(peer: str, environments: Path) -> str | None:
    """Make an environment, unless it is there and of these requirements; the error, if there is one."""
    venv, wanted = environments / peer, _stamp(peer)
    stamp = venv / "stamp"
    if stamp.exists() and stamp.read_text() == wanted:
        return None
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        return f"{venv} is no virtual environment; move it away"
    console.print(f"{peer}: installing…", style="dim")
    started = time.perf_counter()
    for line in commands(peer, environments):
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            return f"{shlex.join(line)}: {last_error(done.stderr)}"
    stamp.write_text(wanted)
    console.print(f"{peer}: made in {time.perf_counter() - started:.0f} s", style="dim")
    return None


def _stamp(peer: str) -> str:
    """What an environment was made of."""
    return sys.version + "".join(file.read_text() for file in _requirements(peer) if file.exists())


def _requirements(peer: str) -> tuple[Path, Path]:
    """The files that name a peer's packages: with their own requirements, and without."""
    return WORKERS / f"requirements-{peer}.txt", WORKERS / f"no-deps-{peer}.txt"


def last_error(log: str) -> str:
    """The sentence that a log of a program which failed ends with: the error itself, where one is to be seen.

    Python's tracebacks end with a line `package.Error: sentence` that is not indented, which may be followed
    by progress bars, warnings, and notes of other threads.
    """
    lines = [line.rpartition("\r")[2].rstrip() for line in log.splitlines()]
    lines = [line for line in lines if line.strip()]
    after = max((i for i, line in enumerate(lines) if line.startswith("Traceback (")), default=None)
    if after is not None:
        told = (line for line in lines[after + 1 :] if not line.startswith((" ", "\t")))
        return next(told, lines[-1])
    return lines[-1] if lines else "no word why"

"""The environments of the peers that `peers.py` measures: one for each `peer_workers/requirements-NAME.txt`.

Packages whose own requirements ask for a GPU are named in `no-deps-NAME.txt` and installed without them.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

WORKERS = Path(__file__).with_name("peer_workers")
OURS = "openawq"


def python_of(peer: str, environments: Path) -> Path:
    """The Python that runs a peer's worker; ours is the one that runs this."""
    return Path(sys.executable) if peer == OURS else environments / peer / "bin" / "python"


def commands(peer: str, environments: Path) -> list[list[str]]:
    """What makes a peer's environment."""
    venv = environments / peer
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    listed = WORKERS / f"requirements-{peer}.txt"
    alone = WORKERS / f"no-deps-{peer}.txt"
    # torch goes first: packages that name it without a version then find it.
    torch = [line for line in listed.read_text().splitlines() if line.startswith("torch==")]
    found = [[sys.executable, "-m", "venv", str(venv)]]
    found += [[*pip, line] for line in torch]
    found += [[*pip, "--requirement", str(listed)]]
    if alone.exists():
        found += [[*pip, "--no-deps", "--requirement", str(alone)]]
    return found


def prepare(peers: list[str], environments: Path, install: bool) -> dict[str, str]:
    """Make the environments that are missing, or tell how.

    Returns:
        Why a peer cannot be run, for those that cannot.
    """
    missing: dict[str, str] = {}
    for peer in peers:
        if python_of(peer, environments).exists():
            continue
        lines = commands(peer, environments)
        if not install:
            missing[peer] = "no environment; make it with --install, or: " + " && ".join(
                map(shlex.join, lines)
            )
            continue
        for line in lines:
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                missing[peer] = f"{shlex.join(line)}: {last_error(done.stderr)}"
                break
    return missing


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

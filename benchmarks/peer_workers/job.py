"""A worker's side of `peers.py`: what to quantize, and the figures to hand back.

A worker is run by the Python of the peer that it drives, with one argument, a folder with `job.json`. It
leaves the quantized checkpoint in `out`, and calls `finish`. Only the standard library is needed here.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import threading
import time
from collections.abc import Iterator
from importlib import _bootstrap  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any


class Job:
    """What the driver asked for.

    Args:
        folder: where `job.json` lies.

    `model` and `out` are folders, `samples` lists of token ids, all of one length; `options` are those of the
    row.
    """

    def __init__(self, folder: Path) -> None:
        asked = json.loads((folder / "job.json").read_text())
        self.model, self.out = asked["model"], asked["out"]
        self.bits: int = asked["bits"]
        self.group_size: int = asked["group_size"]
        self.options: dict[str, Any] = asked["options"]
        self.samples: list[list[int]] = json.loads(Path(asked["samples"]).read_text())
        self._answer = folder / "answer.json"
        self._figures: dict[str, Any] = {}

    @classmethod
    def from_command_line(cls) -> Job:
        """The job of the folder that the command line names."""
        return cls(Path(sys.argv[1]))

    @contextlib.contextmanager
    def quantizing(self) -> Iterator[None]:
        """Counts the seconds inside, and the processor's: from a loaded model to one that can be saved.

        Imports are left out, and counted apart.
        """
        started = clocks()
        with imports_timed() as imports:
            yield
        spent = [end - start - away for start, end, away in zip(started, clocks(), imports, strict=True)]
        self._figures |= {"quantizing": spent[0], "processor": spent[1], "importing": imports[0]}

    def finish(self, **more: Any) -> None:
        """Hand back the figures, `more` among them."""
        answer = {**self._figures, "peak": peak_memory(), **more}
        self._answer.write_text(json.dumps(answer))


def clocks() -> tuple[float, float]:
    """Seconds that have passed, and that the processor has worked for this process."""
    return time.perf_counter(), time.process_time()


@contextlib.contextmanager
def imports_timed() -> Iterator[list[float]]:
    """The seconds of what this thread imports inside, and the processor's.

    Packages import parts of themselves when these are first used, each at a moment of its own. For a module
    that is not loaded yet Python always calls this one function of `importlib`, and again for the modules
    that this module imports.
    """
    spent = [0.0, 0.0]
    find, thread, nested = _bootstrap._find_and_load, threading.get_ident(), False

    def timed(*arguments: Any) -> Any:
        nonlocal nested
        if nested or threading.get_ident() != thread:
            return find(*arguments)
        nested, started = True, clocks()
        try:
            return find(*arguments)
        finally:
            nested = False
            spent[:] = (done + end - start for done, start, end in zip(spent, started, clocks(), strict=True))

    _bootstrap._find_and_load = timed
    try:
        yield spent
    finally:
        _bootstrap._find_and_load = find


def peak_memory() -> int:
    """The resident set of this process at its peak, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # the peak that getrusage tells on Linux counts what the parent held when it forked
        words = status.read_text().partition("VmHWM:")[2].split()
        return int(words[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

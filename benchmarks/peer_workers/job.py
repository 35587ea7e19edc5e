"""A worker's side of `peers.py`: what to quantize, and the figures to hand back.

A worker is run by the Python of the peer that it drives, with one argument, a folder with `job.json`. It
leaves the quantized checkpoint in `out`, and calls `finish`. Only the standard library is needed here.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator
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
        """Counts the seconds inside, and the processor's: from a loaded model to one that can be saved."""
        started, processor = time.perf_counter(), time.process_time()
        yield
        self._figures["quantizing"] = time.perf_counter() - started
        self._figures["processor"] = time.process_time() - processor

    def finish(self, **more: Any) -> None:
        """Hand back the figures, `more` among them."""
        answer = {**self._figures, "peak": peak_memory(), **more}
        self._answer.write_text(json.dumps(answer))


def peak_memory() -> int:
    """The resident set of this process at its peak, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # the peak that getrusage tells on Linux counts what the parent held when it forked
        words = status.read_text().partition("VmHWM:")[2].split()
        return int(words[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

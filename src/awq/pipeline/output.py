"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from awq.pipeline.journal import WORK_FOLDER, check_output, clear, lock, remove_result
from awq.pipeline.writer import disk_errors


@contextmanager
def output_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A working folder inside `out`, whose files move to `out` when the block ends, `config.json` last.

    When the block raises, the working folder is removed and `out` is as it was.

    Raises:
        OutputExistsError: `out` holds something, and is not to be overwritten.
        OutputError: it cannot be written, or another process is writing to it.
    """
    check_output(out, {}, overwrite)
    work, existed = out / WORK_FOLDER, out.exists()
    with lock(out):
        clear(work)
        try:
            yield work
            with disk_errors(out):
                if overwrite:
                    for path in out.iterdir():
                        remove_result(path)
                move_files(work, out)
        except BaseException:
            clear(work)
            if not existed:
                shutil.rmtree(out, ignore_errors=True)
            raise
        clear(work)


def move_files(work: Path, out: Path) -> None:
    """Move a working folder's files, but for its lock, to the same places in `out`, `config.json` last."""
    files = [path for path in sorted(work.rglob("*")) if path.is_file() and path != work / "lock"]
    # A folder without config.json is no model to any loader.
    for path in sorted(files, key=lambda path: path == work / "config.json"):
        target = out / path.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)

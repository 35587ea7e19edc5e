"""What a run remembers, so that a killed one continues with the same command and gives the same bytes.

Inside the output folder lies a working folder: the shards being filled, the hidden states that enter the next
block, and `journal.json` with the settings and the blocks done. Order of events for a block: its tensors are
flushed, then the hidden states behind it are saved under a new name, then the journal is replaced. A kill
between any two leaves a journal that speaks of files that are whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from awq.errors import CheckpointError, OutputError, OutputExistsError, ResumeError
from awq.model import CheckpointReader, read_json
from awq.pipeline.writer import disk_errors, write_json

WORK_FOLDER = ".awq-unfinished"
_JOURNAL, _LOCK = "journal.json", "lock"
# Begins the names of what is no hidden state in the file of those.
_STATE = "state "
# Fields of a journal that are on disk.
_SAVED = ("settings", "batch_tokens", "threads", "blocks", "complete", "mix")
# Bytes read at each of the places where a weight file is sampled to recognise it.
_SAMPLE, _PLACES = 1 << 16, 16


@dataclasses.dataclass
class Journal:
    """The memory of a run.

    Args:
        work: the working folder.
        settings: everything that decides the bytes of the result.
        batch_tokens, threads: tokens of a batch, and threads of the processor: they decide how sums are
            rounded, and so the bytes.
        blocks: reports of the blocks done, in order.
        complete: every tensor is written; what remains is to give the files their names.
        mix: what each layer is quantized to, where that was chosen: as `awq.pipeline.mix` has it.
    """

    work: Path
    settings: dict[str, Any]
    batch_tokens: int
    threads: int
    blocks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    complete: bool = False
    mix: dict[str, Any] | None = None

    @property
    def resumed(self) -> bool:
        """Whether blocks were done by an earlier run."""
        return bool(self.blocks)

    def save(self) -> None:
        """Replace the journal on disk."""
        value = {field: getattr(self, field) for field in _SAVED}
        write_json(self.work / _JOURNAL, value)

    def finish_block(
        self, report: dict[str, Any], hidden: list[Tensor], state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Note a block whose tensors are on disk, and what stands behind it.

        Args:
            report: the block's.
            hidden: hidden states, batch by batch.
            state: what blocks have handed to later ones beside them, by name.
        """
        done = len(self.blocks) + 1
        path = self._hidden(done)
        temporary = path.with_suffix(".tmp")
        with disk_errors(path):
            tensors = {f"{i:06d}": tensor for i, tensor in enumerate(hidden)}
            # Copies: blocks may share one tensor, and the library refuses two names for the same memory.
            tensors |= {f"{_STATE}{name}": tensor.clone() for name, tensor in (state or {}).items()}
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
            os.replace(temporary, path)
        self.blocks.append(report)
        self.save()
        self._hidden(done - 1).unlink(missing_ok=True)

    def behind(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The hidden states behind the last block done, batch by batch, and the state; on the CPU.

        Raises:
            ResumeError: their file is gone or damaged.
        """
        path = self._hidden(len(self.blocks))
        try:
            tensors = load_file(path)
        except Exception as error:
            raise ResumeError(f"{path} cannot be read ({error}); start over with overwrite") from error
        hidden = [tensors[name] for name in sorted(tensors) if not name.startswith(_STATE)]
        return hidden, {n.removeprefix(_STATE): t for n, t in tensors.items() if n.startswith(_STATE)}

    def close(self) -> None:
        """Forget a finished run. The journal goes last: until then the run can be finished again."""
        with disk_errors(self.work):
            clear(self.work, keep=(_JOURNAL, _LOCK))
            clear(self.work)

    def _hidden(self, block: int) -> Path:
        return self.work / f"hidden-{block:05d}.safetensors"


def open_journal(out: Path, settings: dict[str, Any], batch_tokens: int, overwrite: bool) -> Journal:
    """Start a run in `out`, or continue the one that was interrupted there. The folder must be locked.

    Raises:
        OutputExistsError, ResumeError: see `check_output`.
    """
    unfinished = check_output(out, settings, overwrite)
    if unfinished is not None:
        return unfinished
    work = out / WORK_FOLDER
    with disk_errors(work):
        clear(work)
        for path in out.iterdir():
            remove_result(path)
    journal = Journal(work, settings, batch_tokens, torch.get_num_threads())
    journal.save()
    return journal


def check_output(out: Path, settings: dict[str, Any], overwrite: bool) -> Journal | None:
    """The unfinished work in `out` that these settings continue, or None when the folder may be filled anew.

    Raises:
        OutputExistsError: the folder holds a finished checkpoint or foreign files.
        ResumeError: it holds unfinished work made with other settings; the message lists them.
    """
    if overwrite:
        return None
    if (out / WORK_FOLDER / _JOURNAL).exists():
        return _continue(out / WORK_FOLDER, settings)
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is a file; give the name of a folder")
    foreign = sorted(p.name for p in out.iterdir() if p.name != WORK_FOLDER) if out.exists() else []
    if foreign:
        what = "a finished checkpoint" if "config.json" in foreign else f"other files ({foreign[0]}, …)"
        raise OutputExistsError(f"{out} holds {what}; choose another folder, or overwrite it on purpose")
    return None


def is_finished(out: Path) -> bool:
    """Whether a folder holds a checkpoint that no run has anything left to do on."""
    return (out / "config.json").exists() and not (out / WORK_FOLDER / _JOURNAL).exists()


def remove_result(path: Path) -> None:
    """Overwriting removes what a checkpoint consists of, and leaves everything else alone."""
    if path.is_file() and (path.suffix == ".safetensors" or path.name.endswith(".json")):
        path.unlink()


def _continue(work: Path, settings: dict[str, Any]) -> Journal:
    try:
        saved = read_json(work / _JOURNAL)
        theirs, *rest = (saved[field] for field in _SAVED)
    except (CheckpointError, KeyError) as error:
        raise ResumeError(
            f"the journal of unfinished work is unreadable ({error}); start over with overwrite"
        ) from error
    differing = sorted(
        f"{key}: {theirs.get(key)!r} there, {settings.get(key)!r} now"
        for key in set(theirs) | set(settings)
        if theirs.get(key) != settings.get(key)
    )
    if differing:
        raise ResumeError(
            f"{work.parent} holds unfinished work made with other settings ({'; '.join(differing)}); "
            "repeat the earlier command to finish it, choose another folder, or overwrite it on purpose"
        )
    return Journal(work, settings, *rest)


def clear(work: Path, keep: tuple[str, ...] = (_LOCK,)) -> None:
    """Empty a working folder, but for the files named."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold the working folder inside `out` for this process; it is removed if no journal is left in it.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    work = out / WORK_FOLDER
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        handle = (work / _LOCK).open("w")
    with handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # no such locks on this system
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise OutputError(f"another process is writing to {out}") from error
            # Any other refusal: no such locks on this file system.
        try:
            yield
        finally:
            if not (work / _JOURNAL).exists():
                with contextlib.suppress(OSError):
                    handle.close()
                    (work / _LOCK).unlink()
                    work.rmdir()


def taken(out: Path) -> int:
    """Bytes on disk that an earlier run in `out` holds, and that a run there uses again or frees."""
    files = [*out.glob("*.safetensors"), *(out / WORK_FOLDER).glob("*")]
    return sum(getattr(status, "st_blocks", 0) * 512 for status in (path.stat() for path in files))


def recognise(reader: CheckpointReader) -> dict[str, str]:
    """A short hash of config.json and of each weight file: length and samples of its bytes, evenly spread."""
    out = {}
    for name in ["config.json", *reader.files]:
        path = reader.folder / name
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as handle:
            for place in range(_PLACES):
                handle.seek(max(0, size - _SAMPLE) * place // (_PLACES - 1))
                digest.update(handle.read(_SAMPLE))
        out[name] = digest.hexdigest()[:16]
    return out

"""Where calibration text comes from: the bundled books, a file, a data set, or the caller.

Everything is opened as documents, read only as far as they are needed. Data sets go through the optional
`datasets` package; without it, and without a network, the bundled books and local files always work.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from awq.errors import CalibrationError, MissingDependencyError, MissingFileError, first_line

# Short names for data sets: hub name, configuration, split.
_HUB = {
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
}
_RUNNING_TEXT = (".txt", ".text", ".md", "")
# Written between the documents of a text file by the makers of many corpora; no model should read it.
_SEPARATOR = "<|endoftext|>"
_OFFLINE = "without a network, use `bundled` or a local .txt or .jsonl file"
# Rows a streamed data set is shuffled among: they are fetched before the first one is used.
_SHUFFLE_ROWS = 1000
_BUNDLED = {"calibration": "the bundled books", "evaluation": "the bundled held-out books"}


@dataclasses.dataclass(frozen=True)
class Documents:
    """A source, opened.

    Args:
        name: for messages.
        items: texts, token ids, chats or model inputs, one document each, read lazily.
        running_text: the items are one long text.
        folder: where relative paths of images begin; the current folder by default.
    """

    name: str
    items: Iterable[Any]
    running_text: bool = False
    folder: Path | None = None


def open_source(
    source: Any, *, split: str | None = None, text_column: str = "text", seed: int = 42
) -> Documents:
    """Open a calibration source; `awq.calibration.load_calibration` says what it may be.

    Raises:
        CalibrationError, MissingFileError, MissingDependencyError: it cannot be read.
    """
    if isinstance(source, (str, Path)):
        return _open_name(str(source), split, text_column, seed)
    if isinstance(source, Mapping) and "input_ids" in source:
        return Documents("the given inputs", [source])
    if isinstance(source, Sequence):
        if not len(source):
            raise CalibrationError("the list of calibration documents is empty; give some, or use `bundled`")
        return Documents("the given list", source)
    raise CalibrationError(f"calibration data cannot be a {type(source).__name__}; give a name or a list")


def bundled_text(name: str) -> str:
    """A text that ships with the package: `calibration` or `evaluation` (public-domain books, disjoint)."""
    return resources.files("awq").joinpath("data", f"{name}.txt").read_text("utf-8")


def read_text(name: str, text_column: str = "text") -> str:
    """One running text: `bundled` (the held-out books), a text file, or a .jsonl or .json file.

    Documents are joined by an empty line, as is usual for perplexity.

    Raises:
        CalibrationError: the file is not readable as text, or holds chats or token ids.
        MissingFileError: the file does not exist.
    """
    return "\n\n".join(read_documents(name, text_column))


def read_documents(name: str, text_column: str = "text") -> list[str]:
    """The documents of the same sources, one by one; a running text is one document.

    Raises:
        CalibrationError: the file is not readable as text, or holds chats or token ids.
        MissingFileError: the file does not exist.
    """
    if name == "bundled":
        return [bundled_text("evaluation")]
    items = list(_open_file(Path(name).expanduser(), text_column).items)
    if not all(isinstance(item, str) for item in items):
        raise CalibrationError(f"{name} holds more than texts; evaluation takes texts only")
    return items


def _open_name(name: str, split: str | None, text_column: str, seed: int) -> Documents:
    if name == "bundled":
        return Documents(_BUNDLED["calibration"], [bundled_text("calibration")], running_text=True)
    path = Path(name).expanduser()
    if name in _HUB:
        return Documents(name, _rows(_hub(name, split, seed), text_column, name))
    if path.is_dir():
        return Documents(name, _rows(_folder(path, split, seed), text_column, name))
    looks_like_a_file = path.suffix in (".txt", ".jsonl", ".json") or name.startswith((".", "/", "~"))
    if path.is_file() or looks_like_a_file:
        return _open_file(path, text_column)
    if name.count("/") == 1:
        return Documents(name, _rows(_hub(name, split, seed), text_column, name))
    raise MissingFileError(
        f"calibration source {name!r} is no file, no folder, none of bundled, {', '.join(_HUB)}, and no hub "
        f"data set (owner/name); {_OFFLINE}"
    )


def _open_file(path: Path, text_column: str) -> Documents:
    if not path.is_file():
        raise MissingFileError(f"text file {path} does not exist")
    if path.suffix == ".jsonl":
        return Documents(str(path), _jsonl(path, text_column), folder=path.parent)
    if path.suffix == ".json":
        return Documents(str(path), _json(path, text_column), folder=path.parent)
    if path.suffix not in _RUNNING_TEXT:
        raise CalibrationError(f"{path}: {path.suffix} files are not read; give a .txt, .jsonl or .json file")
    text = _decode(path.read_bytes(), str(path))
    if _SEPARATOR in text:
        parts = [part.strip() for part in text.split(_SEPARATOR)]
        return Documents(str(path), [part for part in parts if part])
    return Documents(str(path), [text], running_text=True)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        at = f"line {line}, " if line > 1 else ""
        raise CalibrationError(
            f"{where}: {at}byte {error.start} is not UTF-8 ({error.reason}); convert it to UTF-8"
        ) from error


def _jsonl(path: Path, text_column: str) -> Iterator[Any]:
    # Lines are split as bytes: JSON strings may hold characters that str.splitlines takes for line ends.
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            text = _decode(line, where)
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{where}: not JSON ({error})") from error
            yield _document(row, text_column, where)


def _json(path: Path, text_column: str) -> Iterator[Any]:
    text = _decode(path.read_bytes(), str(path))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise CalibrationError(f"{path} must hold a list of texts, not a {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield _document(row, text_column, f"{path}, entry {number}")


def _document(row: Any, text_column: str, where: str) -> Any:
    """The document in a row: a text or a list as it stands, else the text column or chat messages."""
    if isinstance(row, dict):
        column = next((name for name in (text_column, "messages") if name in row), None)
        if column is None:
            has = ", ".join(map(repr, row)) or "none"
            raise CalibrationError(f"{where}: no column {text_column!r} or 'messages'; it has {has}")
        row = row[column]
    if row is None:
        return ""  # data sets mark an absent text so
    if isinstance(row, (str, list)):
        return row
    raise CalibrationError(
        f"{where}: expected a text, chat messages or token ids, not a {type(row).__name__}"
    )


def _rows(dataset: Iterable[Any], text_column: str, name: str) -> Iterator[Any]:
    for number, row in enumerate(dataset, start=1):
        yield _document(row, text_column, f"{name}, row {number}")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"data sets need the `datasets` package: pip install 'openawq[datasets]'; {_OFFLINE}"
        ) from error
    return datasets


def _folder(path: Path, split: str | None, seed: int) -> Iterator[Any]:
    datasets = _datasets()
    saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # the library raises many kinds
        raise CalibrationError(
            f"{path} is not readable as a data set: {first_line(error).rstrip('.')}"
        ) from error
    if isinstance(loaded, dict):
        chosen = split or ("train" if "train" in loaded else next(iter(loaded)))
        if chosen not in loaded:
            raise CalibrationError(f"{path} has no split {chosen!r}; it has {', '.join(loaded)}")
        loaded = loaded[chosen]
    yield from loaded.shuffle(seed=seed)


def _hub(name: str, split: str | None, seed: int) -> Iterator[Any]:
    hub_name, config, default_split = _HUB.get(name, (name, None, "train"))
    if ":" in hub_name:
        hub_name, _, config = hub_name.partition(":")
    datasets = _datasets()
    try:
        stream = datasets.load_dataset(hub_name, config, split=split or default_split, streaming=True)
        yield from stream.shuffle(seed=seed, buffer_size=_SHUFFLE_ROWS)
    except Exception as error:  # the library and the network raise many kinds
        raise CalibrationError(
            f"data set {name} cannot be fetched: {first_line(error).rstrip('.')}; {_OFFLINE}"
        ) from error

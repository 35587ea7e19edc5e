"""Where calibration text comes from: the bundled books, a file, a data set, or the caller."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from awq.errors import CalibrationError, MissingDependencyError, MissingFileError

# Short names for data sets: hub name, configuration, split.
_HUB = {
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
}
_OFFLINE = "without network use `bundled` or a local .txt or .jsonl file"


@dataclasses.dataclass(frozen=True)
class Documents:
    """A source, opened.

    Args:
        name: for messages.
        items: texts, token ids or chats, one document each.
        running_text: the items are pieces of one long text.
    """

    name: str
    items: Iterable[Any]
    running_text: bool = False


def open_source(source: Any, *, split: str | None = None, text_column: str = "text") -> Documents:
    """Open a calibration source; see `awq.calibration.load_calibration` for what it may be.

    Raises:
        CalibrationError, MissingFileError, MissingDependencyError: it cannot be read.
    """
    if isinstance(source, (str, Path)):
        return _open_name(str(source), split, text_column)
    if isinstance(source, Sequence):
        if not len(source):
            raise CalibrationError("the calibration list is empty")
        return Documents(f"a list of {len(source)} documents", source)
    raise CalibrationError(f"calibration data cannot be a {type(source).__name__}; give a name or a list")


def bundled_text(name: str) -> str:
    """A text that ships with the package: `calibration` or `evaluation` (public-domain books)."""
    return resources.files("awq").joinpath(f"data/{name}.txt").read_text("utf-8")


def _open_name(name: str, split: str | None, text_column: str) -> Documents:
    if name == "bundled":
        return Documents("the bundled books", [bundled_text("calibration")], running_text=True)
    path = Path(name).expanduser()
    if path.is_dir():
        return Documents(name, _rows(_load_folder(path, split), text_column, name))
    if path.is_file() or path.suffix in (".txt", ".jsonl", ".json"):
        return _open_file(path, text_column)
    if name in _HUB or name.count("/") == 1:
        return Documents(name, _rows(_load_hub(name, split), text_column, name))
    raise MissingFileError(
        f"calibration source {name!r} is no file, no folder and no data set (owner/name); {_OFFLINE}"
    )


def _open_file(path: Path, text_column: str) -> Documents:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise MissingFileError(f"calibration file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration file {path} is not readable as UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        return Documents(str(path), list(_jsonl(text, path, text_column)))
    if path.suffix == ".json":
        try:
            items = json.loads(text)
        except ValueError as error:
            raise CalibrationError(f"{path} is not JSON: {error}") from error
        if not isinstance(items, list):
            raise CalibrationError(f"{path} must hold a list of documents")
        return Documents(str(path), items)
    return Documents(str(path), [text], running_text=True)


def _jsonl(text: str, path: Path, text_column: str) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{path}, line {number}: not JSON ({error})") from error
        yield _document(row, text_column, f"{path}, line {number}")


def _document(row: Any, text_column: str, where: str) -> Any:
    """The document in a row: the text column, or chat messages."""
    if isinstance(row, (str, list)):
        return row
    if isinstance(row, dict):
        for column in (text_column, "messages"):
            if column in row:
                return row[column]
        raise CalibrationError(f"{where}: no column {text_column!r}; it has {', '.join(row) or 'none'}")
    raise CalibrationError(f"{where}: expected a text, a list or an object")


def _rows(dataset: Iterable[Any], text_column: str, name: str) -> Iterator[Any]:
    for number, row in enumerate(dataset, start=1):
        yield _document(row, text_column, f"{name}, row {number}")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"data sets need the `datasets` package (pip install 'openawq[datasets]'); {_OFFLINE}"
        ) from error
    return datasets


def _load_folder(path: Path, split: str | None) -> Iterable[Any]:
    datasets = _datasets()
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path))
    except Exception as error:  # the library raises many kinds
        raise CalibrationError(f"{path} is not a readable data set: {error}") from error
    return _pick_split(loaded, split, str(path))


def _pick_split(loaded: Any, split: str | None, name: str) -> Iterable[Any]:
    if not isinstance(loaded, dict):
        return loaded
    chosen = split or ("train" if "train" in loaded else next(iter(loaded)))
    if chosen not in loaded:
        raise CalibrationError(f"{name} has no split {chosen!r}; it has {', '.join(loaded)}")
    return loaded[chosen]


def _load_hub(name: str, split: str | None) -> Iterable[Any]:
    hub_name, config, default_split = _HUB.get(name, (name, None, "train"))
    if ":" in hub_name:
        hub_name, _, config = hub_name.partition(":")
    datasets = _datasets()
    try:
        stream = datasets.load_dataset(hub_name, config, split=split or default_split, streaming=True)
        shuffled = stream.shuffle(seed=42, buffer_size=10_000)
        # The first row is fetched here, so that a missing network shows here and not half-way.
        rows = iter(shuffled)
        first = next(rows)
    except Exception as error:  # the library and the network raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(f"{hub_name} cannot be fetched ({reason}); {_OFFLINE}") from error
    return itertools.chain([first], rows)

"""Every kind of source opened, and every kind of broken one named."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from awq.calibration import CalibrationSet, bundled_text, load_calibration, read_text
from awq.errors import AwqError, CalibrationError, ConfigError, MissingDependencyError, MissingFileError


def texts(found: CalibrationSet) -> list[str]:
    """The samples as the text they were, without the start token."""
    return ["".join(chr(i) for i in sample.tolist() if i != 1) for sample in found.samples]


def rows(folder: Path, name: str, values: list[Any]) -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(value) for value in values), "utf-8")
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.text", "README"])
def test_text_files_are_one_running_text(name: str, tmp_path: Path, letters: Any) -> None:
    (tmp_path / name).write_text("one\n\ntwo", "utf-8")
    found = load_calibration(tmp_path / name, letters, seq_len=100)
    assert texts(found) == ["one\n\ntwo"]
    assert found.documents == 1


def test_a_relative_name_and_a_home_folder_are_files_too(
    tmp_path: Path, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "some.txt").write_text("abc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("words/some.txt", "./words/some.txt", "~/words/some.txt"):
        assert texts(load_calibration(name, letters)) == ["abc"]


def test_jsonl_rows_are_documents_of_any_kind(tmp_path: Path, letters: Any) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = rows(tmp_path, "a.jsonl", [{"text": "one"}, "two", {"messages": chat}, [65, 66], {"text": None}])
    found = load_calibration(path, letters)
    assert texts(found) == ["one", "two", "<user>hi<assistant>ho", "AB"]
    assert found.documents == 4


def test_a_text_file_with_separators_is_documents(tmp_path: Path, letters: Any) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\n\n<|endoftext|>two\n")
    found = load_calibration(tmp_path / "a.txt", letters)
    assert texts(found) == ["one", "two"]
    assert found.documents == 2
    (tmp_path / "b.txt").write_text("<|endoftext|>\n<|endoftext|>")
    with pytest.raises(CalibrationError, match="no document holds any text"):
        load_calibration(tmp_path / "b.txt", letters)


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path, letters: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "tw\xe2\x80\xa8o"}\n\n')
    assert texts(load_calibration(path, letters)) == ["one", "tw\u2028o"]


def test_json_lists_are_documents(tmp_path: Path, letters: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["one", {"body": "two"}]))
    assert texts(load_calibration(path, letters, text_column="body")) == ["one", "two"]


def test_lists_hold_texts_ids_or_chats(letters: Any) -> None:
    chat = ({"role": "user", "content": "hi"},)
    ids = [torch.tensor([[65, 66]]), np.array([67, 68], dtype=np.uint16), [69], (70, 71)]
    found = load_calibration(["one", chat, *ids, "", []], letters)
    assert texts(found) == ["one", "<user>hi", "AB", "CD", "E", "FG"]


def test_token_ids_need_no_tokenizer() -> None:
    found = load_calibration([[3, 4, 5]], None, vocab_size=6)
    assert found.samples[0].tolist() == [3, 4, 5]
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        load_calibration(["text"], None)


def test_the_bundled_books_are_two_and_disjoint() -> None:
    calibration, evaluation = bundled_text("calibration"), bundled_text("evaluation")
    assert min(len(calibration), len(evaluation)) > 500_000
    lines = {line for line in calibration.splitlines() if len(line) > 40}
    shared = sum(line in lines for line in evaluation.splitlines() if len(line) > 40)
    assert shared == 0


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A data set of two splits as `save_to_disk` leaves it."""
    datasets = pytest.importorskip("datasets")
    both = {
        "train": datasets.Dataset.from_dict({"text": [f"train {i}" for i in range(20)]}),
        "test": datasets.Dataset.from_dict({"text": ["test"], "other": [1]}),
    }
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_data_sets_are_shuffled_the_same_way_each_time(saved: Path, letters: Any) -> None:
    one, two = (load_calibration(saved, letters, samples=5) for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    assert texts(one) != [f"train {i}" for i in range(5)]
    assert load_calibration(saved, letters, samples=5, seed=1).fingerprint() != one.fingerprint()
    assert len(set(texts(load_calibration(saved, letters)))) == 20


def test_a_split_is_found_or_the_others_are_named(saved: Path, letters: Any) -> None:
    assert texts(load_calibration(saved, letters, split="test")) == ["test"]
    with pytest.raises(CalibrationError, match="no split 'nope'; it has train, test"):
        load_calibration(saved, letters, split="nope")


def test_a_single_split_is_a_data_set_too(tmp_path: Path, letters: Any) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"body": ["one"]}).save_to_disk(tmp_path / "single")
    assert texts(load_calibration(tmp_path / "single", letters, text_column="body")) == ["one"]
    with pytest.raises(CalibrationError, match=r"row 1: no column 'text' or 'messages'; it has 'body'"):
        load_calibration(tmp_path / "single", letters)


def test_a_folder_of_jsonl_files_is_a_data_set(
    tmp_path: Path, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    rows(tmp_path / "folder", "train.jsonl", [{"text": "one"}, {"text": "two"}])
    assert sorted(texts(load_calibration(tmp_path / "folder", letters))) == ["one", "two"]


@pytest.mark.parametrize("names", [[], ["notes.docx"], ["dataset_dict.json"], ["state.json"]])
def test_a_folder_that_is_no_data_set_is_named(names: list[str], tmp_path: Path, letters: Any) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "folder").mkdir()
    for name in names:
        (tmp_path / "folder" / name).write_text("?")
    with pytest.raises(CalibrationError, match="folder is not readable as a data set"):
        load_calibration(tmp_path / "folder", letters)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\nbad \xff\n", "line 2, byte 9 is not UTF-8"),
        (b"\xff\xfea\x00", "byte 0 is not UTF-8"),
    ],
)
def test_text_that_is_not_utf8_is_shown_where(
    content: bytes, message: str, tmp_path: Path, letters: Any
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CalibrationError, match=f"{message}.*convert it to UTF-8"):
        load_calibration(tmp_path / "a.txt", letters)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', "line 2: byte 13 is not UTF-8"),
        (b'{"text": "unclosed', "line 2: not JSON"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b'{"body": "x", "id": 3}', "line 2: no column 'text' or 'messages'; it has 'body', 'id'"),
        (b"{}", "line 2: no column 'text' or 'messages'; it has none"),
        (b"7", "line 2: expected a text, chat messages or token ids, not a int"),
        (b'{"text": {"deep": "x"}}', "line 2: expected a text, chat messages or token ids, not a dict"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line: bytes, message: str, tmp_path: Path, letters: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(CalibrationError, match=rf"a\.jsonl, {message}"):
        load_calibration(tmp_path / "a.jsonl", letters)


def test_rows_beyond_those_needed_are_not_read(tmp_path: Path, letters: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\nnot json\n')
    assert texts(load_calibration(tmp_path / "a.jsonl", letters, samples=1)) == ["fine"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "not JSON"),
        ('{"text": "x"}', "must hold a list of texts, not a dict"),
        ("[]", "no document holds any text"),
        ('["fine", 3]', "entry 2: expected"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_json_file_is_named(content: str, message: str, tmp_path: Path, letters: Any) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load_calibration(tmp_path / "a.json", letters)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty_files_are_refused(name: str, content: str, tmp_path: Path, letters: Any) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=r"holds? (no|any) text.*`bundled`"):
        load_calibration(tmp_path / name, letters)


@pytest.mark.parametrize("name", ["no.txt", "no.jsonl", "no.json", "no.md", "/no/such/file", "./no", "~/no"])
def test_missing_files_are_named_and_not_looked_for_on_the_hub(
    name: str, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("awq.calibration.sources._datasets", lambda: pytest.fail("asked the hub"))
    with pytest.raises(MissingFileError, match="no"):
        load_calibration(name, letters)


def test_an_unknown_name_is_refused_with_the_known_ones(letters: Any) -> None:
    with pytest.raises(MissingFileError, match=r"'wikitex' is no file.*bundled, pileval, wikitext"):
        load_calibration("wikitex", letters)


def test_files_of_other_kinds_are_refused(tmp_path: Path, letters: Any) -> None:
    (tmp_path / "a.csv").write_text("text\nx")
    with pytest.raises(CalibrationError, match=r"\.csv files are not read"):
        load_calibration(tmp_path / "a.csv", letters)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "list of calibration documents is empty"),
        ([3, 4, 5], "a document cannot be of type int"),
        (b"bytes", "a document cannot be of type int"),
        ([[1.5, 2]], "a document cannot be a list of float and int"),
        ([["a", {"role": "user"}]], "a document cannot be a list of dict and str"),
        ([[True, False]], "a document cannot be a list of bool"),
        ([torch.zeros(3)], "whole numbers, not torch.float32"),
        (
            [torch.zeros(2, 3, dtype=torch.long)],
            r"one row of whole numbers, not torch.int64 of shape \(2, 3\)",
        ),
        ([np.array(["a"])], "token ids must be"),
        ([[10**30]], "token id"),
        ([[5, -1]], "holds the token id -1"),
        ([[5, 0x110000]], "holds the token id 1114112; the vocabulary ends at 1114111"),
        ([None], "a document cannot be of type NoneType"),
        (None, "cannot be a NoneType"),
        (3, "cannot be a int"),
    ],
)
def test_what_is_no_calibration_data_is_refused(source: Any, message: str, letters: Any) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(source, letters)


def test_chats_without_a_template_are_an_error_of_ours(books6m: Path) -> None:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "hi"}]
    with pytest.raises(CalibrationError, match="holds chats, and the tokenizer cannot format one"):
        load_calibration([chat], AutoTokenizer.from_pretrained(books6m))
    with pytest.raises(AwqError, match="tokenizer"):
        load_calibration([chat], None)


class Stream:
    """What `datasets.load_dataset(streaming=True)` returns, as far as we use it."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def shuffle(self, seed: int, buffer_size: int) -> Iterator[Any]:
        assert buffer_size > 1
        yield from self.items


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("pileval", ("mit-han-lab/pile-val-backup", None, "validation")),
        ("wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("someone/something", ("someone/something", None, "train")),
        ("someone/something:english", ("someone/something", "english", "train")),
    ],
)
def test_hub_names_are_asked_for_by_repository_configuration_and_split(
    name: str, asked: tuple[Any, ...], letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load_dataset(path: str, config: str | None, split: str, streaming: bool) -> Stream:
        assert streaming
        calls.append((path, config, split))
        return Stream([{"text": "one"}, {"text": ""}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts(load_calibration(name, letters)) == ["one", "two"]
    load_calibration(name, letters, split="other")
    assert calls == [asked, (*asked[:2], "other")]


@pytest.mark.parametrize("error", [ConnectionError("no route\nto the hub"), ValueError(), RuntimeError("?")])
def test_a_hub_that_cannot_be_reached_is_an_error_with_the_cure(
    error: Exception, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CalibrationError, match=r"cannot be fetched.*use `bundled` or a local") as caught:
        load_calibration("pileval", letters)
    assert "\n" not in str(caught.value)


def test_a_connection_lost_on_the_way_is_an_error_of_ours(
    letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaking(Stream):
        def shuffle(self, seed: int, buffer_size: int) -> Iterator[Any]:
            yield {"text": "one"}
            raise ConnectionError("reset")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: Breaking([])))
    with pytest.raises(CalibrationError, match="cannot be fetched: reset"):
        load_calibration("someone/something", letters)


def test_the_datasets_package_is_only_needed_for_data_sets(
    letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(MissingDependencyError, match=r"pip install 'openawq\[datasets\]'"):
        load_calibration("wikitext", letters)
    assert load_calibration("bundled", letters, samples=2).tokens == 1024


def test_an_evaluation_text_is_one_text(tmp_path: Path) -> None:
    assert read_text("bundled") == bundled_text("evaluation")
    assert read_text(str(rows(tmp_path, "a.jsonl", [{"text": "one"}, {"text": "two"}]))) == "one\n\ntwo"
    with pytest.raises(CalibrationError, match="takes texts only"):
        read_text(str(rows(tmp_path, "b.jsonl", [[1, 2]])))
    with pytest.raises(MissingFileError, match=r"no\.txt does not exist"):
        read_text(str(tmp_path / "no.txt"))

"""How documents become samples: every token of every one, cut on purpose, counted."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awq.calibration import CalibrationSet, load_calibration
from awq.errors import ConfigError

documents = st.lists(st.lists(st.integers(0, 99), max_size=40), min_size=1, max_size=12)


@given(docs=documents, seq_len=st.integers(1, 50))
def test_split_documents_keep_every_token_in_order(docs: list[list[int]], seq_len: int) -> None:
    if not any(docs):
        return
    found = load_calibration(docs, None, samples=10_000, seq_len=seq_len)
    assert [i for sample in found.samples for i in sample.tolist()] == [i for doc in docs for i in doc]
    assert all(1 <= len(sample) <= seq_len for sample in found.samples)
    assert found.tokens == sum(map(len, docs))
    assert found.truncated_tokens == 0
    assert found.documents == sum(map(bool, docs))


@given(docs=documents, seq_len=st.integers(1, 50), samples=st.integers(1, 30))
def test_truncated_documents_keep_their_beginnings_and_count_the_rest(
    docs: list[list[int]], seq_len: int, samples: int
) -> None:
    kept = [doc for doc in docs if doc][:samples]
    if not kept:
        return
    found = load_calibration(docs, None, samples=samples, seq_len=seq_len, long="truncate")
    assert [sample.tolist() for sample in found.samples] == [doc[:seq_len] for doc in kept]
    assert found.truncated_tokens == sum(map(len, kept)) - found.tokens


@given(docs=documents, seq_len=st.integers(1, 50), samples=st.integers(1, 30))
def test_tokens_used_and_tokens_dropped_are_those_of_the_documents_used(
    docs: list[list[int]], seq_len: int, samples: int
) -> None:
    if not any(docs):
        return
    found = load_calibration(docs, None, samples=samples, seq_len=seq_len)
    used = [doc for doc in docs if doc][: found.documents]
    assert len(found.samples) <= samples
    assert found.tokens + found.truncated_tokens == sum(map(len, used))


def test_documents_are_never_glued_to_one_another() -> None:
    found = load_calibration([[1] * 5, [2] * 3, [3]], None, seq_len=4)
    assert [sample.tolist() for sample in found.samples] == [[1] * 4, [1], [2] * 3, [3]]


@given(
    length=st.integers(1, 3000),
    seq_len=st.integers(1, 64),
    samples=st.integers(1, 40),
)
def test_windows_of_a_running_text_are_spread_evenly(length: int, seq_len: int, samples: int) -> None:
    def counting(*_: Any, **__: Any) -> dict[str, Any]:
        return {"input_ids": list(range(length))}

    found = load_calibration("bundled", counting, samples=samples, seq_len=seq_len)
    begins = [int(sample[0]) for sample in found.samples]
    for sample, begin in zip(found.samples, begins, strict=True):
        assert sample.tolist() == list(range(begin, begin + len(sample)))
    assert begins == sorted(set(begins))
    if length <= samples * seq_len:
        assert found.tokens == length  # all of it is wanted, its shorter tail too
    else:
        assert len(found.samples) == samples
        assert all(len(sample) == seq_len for sample in found.samples)
        whole = length // seq_len
        steps = [b // seq_len for b in begins]
        gaps = [after - before for before, after in itertools.pairwise([*steps, whole])]
        assert max(gaps) - min(gaps) <= 1


def test_a_running_text_starts_once(tmp_path: Path, letters: Any) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij")
    found = load_calibration(tmp_path / "a.txt", letters, seq_len=4)
    assert [sample.tolist() for sample in found.samples] == [
        [1, *map(ord, "abc")],
        [*map(ord, "defg")],
        [*map(ord, "hij")],
    ]


def test_a_chat_is_not_started_again_after_its_template(letters: Any) -> None:
    (sample,) = load_calibration([[{"role": "user", "content": "hi"}]], letters).samples
    assert sample.tolist() == list(map(ord, "<user>hi"))


def test_samples_hold_memory_of_their_own() -> None:
    """A window that is a view would keep the whole text alive, and could be changed through it."""
    ids = torch.arange(100)
    found = load_calibration([ids], None, seq_len=10)
    ids.zero_()
    assert found.samples[1].tolist() == list(range(10, 20))


def test_the_numbers_are_told_in_words(tmp_path: Path, letters: Any) -> None:
    (tmp_path / "a.txt").write_text("x" * 999)
    few = load_calibration(tmp_path / "a.txt", letters, samples=3, seq_len=100).describe()
    assert few == (
        f"3 samples of up to 100 tokens, 300 tokens in all, from {tmp_path / 'a.txt'} "
        "(windows spread evenly over 1,000 tokens)"
    )
    cut = load_calibration([[1] * 9, [2]], None, seq_len=4, long="truncate").describe()
    assert cut == (
        "2 samples of up to 4 tokens, 5 tokens in all, from 2 documents of the given list; 5 tokens dropped"
    )
    one = load_calibration([[1]], None).describe()
    assert one == "1 sample of up to 1 token, 1 token in all, from 1 document of the given list"


def test_the_fingerprint_tells_apart_what_tokens_and_cuts_tell_apart() -> None:
    def of(*samples: list[int]) -> str:
        return CalibrationSet(tuple(map(torch.tensor, samples)), "", 1).fingerprint()

    different = {of([1, 2, 3]), of([1, 2], [3]), of([1], [2, 3]), of([3, 2, 1]), of([1, 2, 3], [0])}
    assert len(different) == 5
    assert of([1, 2, 3]) == of([1, 2, 3])
    # SHA-256 over u64 lengths and i64 ids, little-endian: known to others, and the same on every machine.
    assert of([1]) == "814dd7b9784d57c15b9c2972e9b4fd6cf7e164f8162a934bdb2452a413dab1f7"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"long": "fold"}, "choose split or truncate"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_calibration([[1]], None, **options)

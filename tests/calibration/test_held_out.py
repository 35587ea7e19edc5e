"""Which text a quantized model is judged on: unseen where there is any, and told in any case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from awq.calibration import HeldOut, held_out, load_calibration
from awq.errors import LoadError


def chosen(source: Any, tokenizer: Any, vocabulary: int = 1 << 20, **options: Any) -> tuple[Any, HeldOut]:
    """The calibration samples, and the text that is held out for them."""
    calibration = load_calibration(source, tokenizer, spare=16, **options)
    text = held_out(source, calibration, tokenizer, vocabulary, 64)
    assert text is not None
    return calibration, text


def no_tokenizer(*_: Any, **__: Any) -> Any:
    raise LoadError("there is no tokenizer")


def test_the_bundled_calibration_is_judged_on_the_bundled_held_out_books(letters: Any) -> None:
    text = chosen("bundled", letters, samples=2, seq_len=64)[1]
    assert text.source == "excerpts of the bundled held-out books"
    assert [len(ids) for ids in text.ids] == [64] * 16
    assert all(int(ids[0]) == letters.START for ids in text.ids)  # each begins as a text does
    assert len({tuple(ids.tolist()) for ids in text.ids}) == 16


def test_windows_of_a_running_text_that_were_not_used_are_held_out(tmp_path: Path, letters: Any) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) + chr(65 + i // 26 % 26) for i in range(2000)))
    calibration, text = chosen(str(tmp_path / "a.txt"), letters, samples=20, seq_len=64)
    assert text.source == "the part of the calibration text that was not used"
    assert len(text.ids) == 16
    used = {tuple(sample.tolist()) for sample in calibration.samples}
    assert not used & {tuple(ids.tolist()) for ids in text.ids}


def test_documents_behind_those_that_were_used_are_held_out(tmp_path: Path, letters: Any) -> None:
    rows = [json.dumps({"text": chr(97 + i) * 80}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    calibration, text = chosen(str(tmp_path / "a.jsonl"), letters, samples=5, seq_len=64)
    assert text.source == "the part of the calibration text that was not used"
    used = [tuple(sample.tolist()) for sample in calibration.samples]
    # Two documents and the beginning of a third were used; its rest comes first.
    assert text.ids[0].tolist() == [ord("c")] * 17
    assert text.ids[1].tolist() == [letters.START] + [ord("d")] * 63
    assert not set(used) & {tuple(ids.tolist()) for ids in text.ids}


def test_a_bad_row_behind_the_documents_that_are_needed_hurts_nobody(tmp_path: Path, letters: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 50}) + "\nnot json\n")
    calibration, text = chosen(str(tmp_path / "a.jsonl"), letters, samples=1, seq_len=64)
    assert len(calibration.samples) == 1
    assert text.source == "excerpts of the bundled held-out books"


def test_a_text_that_is_used_up_is_followed_by_the_bundled_books(tmp_path: Path, letters: Any) -> None:
    (tmp_path / "a.txt").write_text("a short text")
    assert chosen(str(tmp_path / "a.txt"), letters)[1].source == "excerpts of the bundled held-out books"


@pytest.mark.parametrize("vocabulary", [1 << 20, 5])
def test_where_no_text_can_be_read_the_calibration_samples_serve_and_that_is_told(
    vocabulary: int, letters: Any
) -> None:
    tokenizer = no_tokenizer if vocabulary > 5 else letters  # none at all, or one of another model
    calibration = load_calibration([[1, 2, 3], [4], [3, 4]], None, spare=16, vocab_size=5)
    text = held_out([[1]], calibration, tokenizer, vocabulary, None)
    assert text is not None
    assert [ids.tolist() for ids in text.ids] == [[1, 2, 3], [3, 4]]
    assert text.source == "the calibration samples themselves (no other text was at hand)"


def test_token_ids_that_were_not_used_are_held_out() -> None:
    rows = torch.arange(6000).view(60, 100).tolist()
    _, text = chosen(rows, no_tokenizer, samples=40, seq_len=100)
    assert [ids[0].item() for ids in text.ids] == [4000 + 100 * i for i in range(16)]


def test_there_may_be_nothing_to_judge_by() -> None:
    calibration = load_calibration([[4]], None)
    assert held_out([[4]], calibration, no_tokenizer, 10, None) is None

"""Perplexity against transformers' own loss, and windows that score every token exactly once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scripted
from torch import Tensor

from awq.errors import CalibrationError, ConfigError, EvaluationError, MissingFileError
from awq.evaluate import document_ids, perplexity, token_ids, windows
from awq.evaluate.windows import Mean, batches


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return tiny("llama", num_key_value_heads=2)


def some_ids(count: int) -> Tensor:
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_it_is_the_exponential_of_transformers_own_loss(model: Any) -> None:
    ids = some_ids(160)
    found = perplexity(model, ids, window=32, batch_size=3)
    losses = [float(model(row[None], labels=row[None]).loss) for row in ids.view(5, 32)]
    assert found.nll == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert (found.windows, found.window, found.stride, found.tokens) == (5, 32, 32, 5 * 31)


@torch.no_grad()
def test_overlapping_windows_give_what_masked_labels_give(model: Any) -> None:
    ids = some_ids(100)
    found = perplexity(model, ids, window=32, stride=8, batch_size=4)
    total = count = 0.0
    for begin in range(0, 100 - 32 + 1, 8):
        piece = ids[None, begin : begin + 32]
        labels = piece.clone()
        labels[:, : 24 if begin else 0] = -100  # transformers' mark for tokens that are not scored
        scored = 8 if begin else 31
        total += float(model(piece, labels=labels).loss) * scored
        count += scored
    assert found.nll == pytest.approx(total / count, rel=1e-5)
    assert found.tokens == count


def test_the_size_of_batches_changes_nothing(model: Any) -> None:
    results = [perplexity(model, some_ids(130), window=16, batch_size=size).nll for size in (1, 3, 100)]
    assert results[1:] == pytest.approx([results[0]] * 2, rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    uniform = Scripted(lambda ids: torch.zeros(*ids.shape, 50))
    found = perplexity(uniform, torch.arange(40) % 50, window=8)
    assert found.value == pytest.approx(50, rel=1e-5)
    assert found.stderr == pytest.approx(0, abs=1e-4)


def test_a_model_that_knows_everything_has_perplexity_one() -> None:
    def right(ids: Tensor) -> Tensor:
        return 200.0 * torch.nn.functional.one_hot(torch.roll(ids, -1, dims=1), 50).float()

    assert perplexity(Scripted(right), torch.arange(40) % 50, window=8).value == pytest.approx(1)


def test_a_hopeless_model_has_an_infinite_perplexity_and_is_no_crash() -> None:
    def wrong(ids: Tensor) -> Tensor:
        return -2e4 * torch.nn.functional.one_hot(torch.roll(ids, -1, dims=1), 50).float()

    found = perplexity(Scripted(wrong), torch.arange(40) % 50, window=8)
    assert found.nll == pytest.approx(2e4, rel=1e-3)
    assert found.value == math.inf


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    def broken(ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 50)
        logits[-1, 3, 7] = value
        return logits

    with pytest.raises(EvaluationError, match="NaN or infinite logits"):
        perplexity(Scripted(broken), torch.arange(40), window=8)


def test_the_definition_is_told_with_its_figures(model: Any) -> None:
    assert perplexity(model, some_ids(2048), window=64, stride=32).definition() == (
        "exp(mean negative log-likelihood) over 63 windows of up to 64 tokens, stride 32, 2,047 tokens scored"
    )


@given(length=st.integers(2, 300), window=st.integers(2, 40), data=st.data())
def test_every_token_that_a_window_reaches_is_scored_exactly_once(
    length: int, window: int, data: Any
) -> None:
    stride = data.draw(st.integers(1, window))
    if length < window:
        return
    pieces = windows(torch.arange(length), window, stride)
    scored: list[int] = []
    for ids, mask in batches(pieces, 3):
        scored += ids[:, 1:][mask].tolist()
    reached = (length - window) // stride * stride + window
    # Windows that do not overlap have nothing to predict their first token from.
    unpredicted = set(range(0, length, window)) if stride == window else {0}
    assert scored == [i for i in range(reached) if i not in unpredicted]
    assert reached > length - stride


@given(lengths=st.lists(st.integers(0, 60), max_size=6), window=st.integers(2, 40), data=st.data())
def test_every_token_of_every_document_is_scored_exactly_once(
    lengths: list[int], window: int, data: Any
) -> None:
    stride = data.draw(st.integers(1, window))
    if max(lengths, default=0) < 2:
        with pytest.raises(CalibrationError, match="nothing to predict"):
            windows([torch.arange(n) for n in lengths], window, stride)
        return
    # Tokens tell their document by their thousands; 0 is padding, which is never scored.
    documents = [torch.arange(1, n + 1) + 1000 * i for i, n in enumerate(lengths)]
    scored: list[int] = []
    for ids, mask in batches(windows(documents, window, stride), 3):
        assert len(ids[0]) <= window
        scored += ids[:, 1:][mask].tolist()
    step = window if stride == window else 10**6
    assert scored == [
        1000 * i + 1 + place for i, n in enumerate(lengths) for place in range(n) if place % step
    ]


@torch.no_grad()
def test_documents_are_judged_each_by_itself(model: Any) -> None:
    ids = some_ids(60)
    documents = [ids[:20], ids[20:23], ids[23:24], ids[24:60]]
    found = perplexity(model, documents, window=50, batch_size=3)
    parts = [documents[i][None] for i in (0, 1, 3)]
    total = sum(float(model(part, labels=part).loss) * (part.shape[1] - 1) for part in parts)
    assert found.tokens == 19 + 2 + 35
    assert found.nll == pytest.approx(total / found.tokens, rel=1e-5)


@given(length=st.integers(2, 200), window=st.integers(2, 40), limit=st.integers(2, 250))
def test_a_limit_uses_the_beginning_of_the_text(length: int, window: int, limit: int) -> None:
    if min(length, limit) < window:
        with pytest.raises(CalibrationError):
            windows(torch.arange(length), window, max_tokens=limit)
        return
    limited = windows(torch.arange(length), window, max_tokens=limit)
    cut = windows(torch.arange(min(length, limit)), window)
    assert [piece.ids.tolist() for piece in limited] == [piece.ids.tolist() for piece in cut]


@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 0}, {"window": 8, "stride": 0}, {"window": 8, "stride": 9}]
)
def test_sizes_without_meaning_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"window=\d+ must .* stride=\d+ between"):
        windows(torch.arange(100), **options)


@pytest.mark.parametrize("limit", [None, 0, 5])
def test_a_text_shorter_than_a_window_is_refused(limit: int | None) -> None:
    count = 7 if limit is None else limit
    with pytest.raises(CalibrationError, match=f"{count} tokens, fewer than one window of 8"):
        windows(torch.arange(7), 8, max_tokens=limit)


@given(
    rows=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    seed=st.integers(0, 1000),
    parts=st.integers(1, 4),
)
def test_means_and_standard_errors_are_those_of_a_ratio_over_windows(
    rows: list[int], seed: int, parts: int
) -> None:
    """The linearised error of a ratio of sums, with n - 1, in plain numpy."""
    random = np.random.default_rng(seed)
    values = random.normal(2, 1, (len(rows), 9))
    scored = np.arange(9) < np.array(rows)[:, None]
    mean = Mean()
    for value, mask in zip(np.array_split(values, parts), np.array_split(scored, parts), strict=True):
        mean.add(torch.from_numpy(value), torch.from_numpy(mask))
    got, error = mean.result()
    kept = values[scored]
    assert mean.tokens == kept.size
    assert got == pytest.approx(kept.mean())
    residuals = [values[i][scored[i]].sum() - kept.mean() * scored[i].sum() for i in range(len(rows))]
    average = scored.sum() / len(rows)
    assert error == pytest.approx(np.std(residuals, ddof=1) / average / math.sqrt(len(rows)), rel=1e-6)


def test_equal_windows_have_the_usual_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=(20, 8))
    mean = Mean()
    mean.add(torch.from_numpy(values), torch.ones(20, 8, dtype=torch.bool))
    got, error = mean.result()
    assert got == pytest.approx(values.mean())
    assert error == pytest.approx(values.mean(axis=1).std(ddof=1) / math.sqrt(20))


def test_one_window_has_no_standard_error() -> None:
    mean = Mean()
    mean.add(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool))
    assert mean.result()[0] == 1
    assert math.isnan(mean.result()[1])


def test_texts_are_tokenized_once(tmp_path: Path) -> None:
    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text)]}

    (tmp_path / "a.txt").write_text("ab")
    assert token_ids(tmp_path / "a.txt", tokenizer).tolist() == [1, 97, 98]
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match="holds no text"):
        token_ids(tmp_path / "empty.txt", tokenizer)
    with pytest.raises(MissingFileError):
        token_ids(tmp_path / "no.txt", tokenizer)


def test_texts_with_separators_are_documents_or_joined_by_blank_lines(tmp_path: Path) -> None:
    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}

    (tmp_path / "a.txt").write_text("ab\n<|endoftext|>\n \n<|endoftext|>\ncd\n")
    joined = token_ids(tmp_path / "a.txt", tokenizer)
    assert "".join(map(chr, joined.tolist())) == "ab\n\ncd"
    documents = document_ids(tmp_path / "a.txt", tokenizer)
    assert ["".join(map(chr, ids.tolist())) for ids in documents] == ["ab", "cd"]
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(CalibrationError, match="holds no text"):
        document_ids(tmp_path / "empty.jsonl", tokenizer)

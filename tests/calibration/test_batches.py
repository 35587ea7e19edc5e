"""Batches: every sample once, whatever the lengths, with padding that a mask takes back out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awq.calibration import make_batches
from awq.errors import CalibrationError, ConfigError

ragged = st.lists(
    st.lists(st.integers(0, 99), min_size=1, max_size=30).map(lambda ids: torch.tensor(ids)),
    max_size=25,
)
limits = st.integers(1, 200)


@given(samples=ragged, limit=limits)
def test_every_sample_appears_once_and_whole(samples: list[Tensor], limit: int) -> None:
    seen: dict[int, list[int]] = {}
    for batch in make_batches(samples, batch_tokens=limit):
        for row, index in enumerate(batch.index):
            keep = slice(None) if batch.mask is None else batch.mask[row]
            assert index not in seen
            seen[index] = batch.input_ids[row][keep].tolist()
    assert seen == {i: sample.tolist() for i, sample in enumerate(samples)}


@given(samples=ragged, limit=limits)
def test_padding_is_on_the_right_masked_and_of_the_samples_own_tokens(
    samples: list[Tensor], limit: int
) -> None:
    for batch in make_batches(samples, batch_tokens=limit):
        if batch.mask is None:
            assert all(len(samples[i]) == batch.input_ids.shape[1] for i in batch.index)
            continue
        assert not bool(batch.mask.all())
        for row, index in enumerate(batch.index):
            length = len(samples[index])
            assert bool(batch.mask[row, :length].all())
            assert not bool(batch.mask[row, length:].any())
            assert set(batch.input_ids[row, length:].tolist()) <= {int(samples[index][-1])}


@given(samples=ragged, limit=limits)
def test_no_batch_is_larger_than_allowed_and_none_is_empty(samples: list[Tensor], limit: int) -> None:
    for batch in make_batches(samples, batch_tokens=limit):
        assert len(batch.index) == batch.input_ids.shape[0] >= 1
        assert batch.input_ids.numel() <= limit or len(batch.index) == 1


@given(samples=ragged, limit=limits)
def test_the_same_samples_give_the_same_batches(samples: list[Tensor], limit: int) -> None:
    one, two = (make_batches(samples, batch_tokens=limit) for _ in range(2))
    assert [batch.index for batch in one] == [batch.index for batch in two]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(one, two, strict=True))


@given(samples=ragged, limit=limits)
def test_a_batch_is_as_full_as_it_can_be(samples: list[Tensor], limit: int) -> None:
    """The next sample would not have fitted: samples are taken in order of length, longest first."""
    made = make_batches(samples, batch_tokens=limit)
    widths = [batch.input_ids.shape[1] for batch in made]
    assert widths == sorted(widths, reverse=True)
    assert all((len(batch.index) + 1) * batch.input_ids.shape[1] > limit for batch in made[:-1])


def test_an_empty_sample_and_a_limit_below_one_are_refused() -> None:
    with pytest.raises(CalibrationError, match="sample 1 holds no tokens"):
        make_batches([torch.tensor([1]), torch.tensor([], dtype=torch.long)], batch_tokens=4)
    with pytest.raises(ConfigError, match="batch_tokens=0"):
        make_batches([torch.tensor([1])], batch_tokens=0)

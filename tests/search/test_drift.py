"""Corrections for what is wrong in the sum behind a layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awq.search import DriftAccumulator


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correction(missing: Tensor, inputs: Tensor, pieces: int = 1) -> Tensor:
    sums = DriftAccumulator(missing.shape[1], inputs.shape[1])
    for part, given_inputs in zip(missing.chunk(pieces), inputs.chunk(pieces), strict=True):
        sums.add(part, given_inputs)
    return sums.correction()


def test_what_is_linear_in_the_inputs_is_found() -> None:
    inputs, lost = random(0, 20000, 8), random(1, 5, 8)
    found = correction(inputs @ lost.t(), inputs)
    assert torch.allclose(found, lost, rtol=0.01, atol=0.01)


def test_noise_is_hardly_learnt_and_the_less_the_fewer_tokens_there_are() -> None:
    """A plain fit learns channels / tokens of it by heart: all, where there are as many."""
    inputs, noise = random(0, 4096, 64), random(1, 4096, 16)
    for tokens in (64, 128, 512, 4096):
        some = inputs[:tokens]
        learnt = some @ correction(noise[:tokens], some).t()
        assert float(learnt.square().mean()) < min(0.05, 64 / tokens)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 24), st.integers(1, 12), st.integers(24, 200))
def test_the_error_on_the_tokens_seen_never_grows(seed: int, channels: int, rows: int, tokens: int) -> None:
    inputs = random(seed, tokens, channels) * random(seed + 1, channels).exp()
    missing = inputs @ random(seed + 2, rows, channels).t() + random(seed + 3, tokens, rows)
    left = missing - inputs @ correction(missing, inputs).t()
    assert float(left.square().sum()) <= float(missing.square().sum()) * (1 + 1e-5)


def test_batches_add_up() -> None:
    inputs, missing = random(0, 90, 8), random(1, 90, 4)
    assert torch.allclose(correction(missing, inputs), correction(missing, inputs, pieces=3), atol=1e-5)


def test_with_fewer_tokens_than_channels_nothing_is_changed() -> None:
    assert not correction(random(0, 15, 4), random(1, 15, 16)).any()
    assert correction(random(0, 16, 4), random(1, 16, 16)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_left_out(bad: float) -> None:
    inputs, missing = random(0, 40, 8), random(1, 40, 4)
    wrong_inputs, wrong_missing = inputs.clone(), missing.clone()
    wrong_inputs[3, 1] = wrong_missing[7, 2] = bad
    keep = [row for row in range(40) if row not in (3, 7)]
    found = correction(wrong_missing, wrong_inputs)
    assert torch.allclose(found, correction(missing[keep], inputs[keep]), atol=1e-6)


def test_dead_channels_do_no_harm() -> None:
    inputs = random(0, 200, 8)
    inputs[:, 3] = 0
    found = correction(random(1, 200, 4), inputs)
    assert torch.isfinite(found).all()
    assert not found[:, 3].any()

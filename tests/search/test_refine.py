"""Refitted scales and descending codes: never worse, as good as can be proved on small cases."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awq.search import Codes, GramAccumulator, InputStats, full_range, gptq, nearest, refine
from awq.search.refine import damped

HALF = torch.float16


def correlated(channels: int, seed: int, width: int | None = None) -> InputStats:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    total = GramAccumulator(channels, width)
    total.add(torch.randn(6 * channels, channels, generator=generator) @ mixing)
    return total.finish()


def weight_of(rows: int, channels: int, seed: int) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, codes: Codes, stats: InputStats) -> Tensor:
    """Error of each row under the damped statistics that rounding uses."""
    delta = (codes.values() - weight).double()
    gram = torch.block_diag(*damped(stats.gram)).double()
    return (delta @ gram * delta).sum(1)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([8, 16, 64]),
    parts=st.sampled_from([1, 2]),
    rounds=st.integers(1, 3),
    seed=st.integers(0, 99),
    start=st.sampled_from(["nearest", "gptq"]),
)
def test_no_row_is_ever_worse_than_it_was(
    bits: int, size: int, parts: int, rounds: int, seed: int, start: str
) -> None:
    stats, weight = correlated(128, seed, 128 // parts), weight_of(9, 128, seed + 1)
    low, high = full_range(weight, size)
    if start == "gptq":
        before = gptq(weight, stats, low, high, bits, HALF)
    else:
        before = nearest(weight, low, high, bits, HALF)
    after = refine(weight, stats, before, bits, rounds)
    assert (error(weight, after, stats) <= error(weight, before, stats) * (1 + 1e-4)).all()
    assert int(after.codes.max()) < 2**bits
    assert torch.equal(after.zeros, before.zeros)
    assert bool((after.scales > 0).all())


def test_rows_in_pieces_get_the_scales_they_get_together(monkeypatch: pytest.MonkeyPatch) -> None:
    stats, weight = correlated(128, 3, 64), weight_of(37, 128, 4)
    start = nearest(weight, *full_range(weight, 16), 4, HALF)
    whole = refine(weight, stats, start, 4, 1)
    # Products of five rows at a time, systems of sixteen.
    for floats in (5 * 64 * 4, 16 * 4**2):
        monkeypatch.setattr(sys.modules["awq.search.refine"], "_FLOATS", floats)
        pieces = refine(weight, stats, start, 4, 1)
        assert torch.allclose(pieces.scales.float(), whole.scales.float(), rtol=1e-3)
        assert float((pieces.codes == whole.codes).float().mean()) > 0.99


def test_it_takes_a_good_part_of_what_compensation_leaves() -> None:
    stats, weight = correlated(128, 0), weight_of(64, 128, 1)
    start = gptq(weight, stats, *full_range(weight, 32), 4, HALF)
    errors = [float(error(weight, refine(weight, stats, start, 4, n), stats).sum()) for n in (0, 1, 2)]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < errors[1]


def test_where_it_ends_no_single_code_can_be_moved_to_advantage() -> None:
    stats, weight = correlated(16, 3), weight_of(3, 16, 4)
    start = nearest(weight, *full_range(weight, 8), 3, HALF)
    best = refine(weight, stats, start, 3, 40)
    ends = error(weight, best, stats)
    for row, column, step in itertools.product(range(3), range(16), (-1, 1)):
        codes = best.codes.clone().int()
        codes[row, column] += step
        if 0 <= int(codes[row, column]) < 8:
            moved = error(weight, Codes(codes.to(torch.uint8), best.scales, best.zeros), stats)
            assert float(moved[row]) >= float(ends[row]) * (1 - 1e-5)


@pytest.mark.parametrize("size", [8, 32])
def test_a_weight_that_the_codes_hold_exactly_stays(size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (4, 32), generator=generator, dtype=torch.uint8)
    groups = 32 // size
    held = Codes(
        codes, (torch.rand(4, groups, generator=generator) + 0.5).half(), torch.full((4, groups), 7).byte()
    )
    after = refine(held.values(), correlated(32, 6), held, 4, 2)
    assert torch.equal(after.codes, held.codes)
    torch.testing.assert_close(after.scales, held.scales, rtol=2e-3, atol=0)


def test_a_scale_that_is_off_finds_back() -> None:
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 16, (4, 32), generator=generator, dtype=torch.uint8)
    true = Codes(codes, (torch.rand(4, 2, generator=generator) + 0.5).half(), torch.full((4, 2), 7).byte())
    off = Codes(codes, (true.scales.float() * 1.03).half(), true.zeros)
    stats = correlated(32, 8)
    after = refine(true.values(), stats, off, 4, 1)
    assert float(error(true.values(), after, stats).sum()) < 1e-4 * float(
        error(true.values(), off, stats).sum()
    )


@pytest.mark.parametrize(
    "gram", [torch.zeros(1, 16, 16), torch.ones(1, 16, 16), torch.full((1, 16, 16), 1e-30)]
)
def test_degenerate_statistics_leave_finite_values(gram: Tensor) -> None:
    weight = weight_of(4, 16, 9)
    weight[0] = 0
    start = nearest(weight, *full_range(weight, 8), 4, HALF)
    after = refine(weight, InputStats(gram, torch.zeros(16), 0), start, 4, 2)
    assert torch.isfinite(after.values()).all()
    assert (after.values() - weight).abs().max() <= 3 * start.scales.max()

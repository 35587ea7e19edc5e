"""Norms and attention in C++ against the same in float64, for each instruction set there is here."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awq.kernels import cpu_decoding, cpu_native, native
from awq.kernels.cpu_decoding import attend, attend_refuses, rms_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * (weight.double() + offset)


def exact_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    keys, values = (each.double().repeat_interleave(shared, 1) for each in (key, value))
    scores = query.double() @ keys.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


@settings(max_examples=100)
@given(
    rows=st.integers(1, 6),
    channels=st.sampled_from([16, 48, 64, 256, 272, 2048]),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
    offset=st.sampled_from([0.0, 1.0]),
    rounds=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_norm_is_at_most_its_roundings_away(
    rows: int,
    channels: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    size: float,
    offset: float,
    rounds: bool,
    seed: int,
) -> None:
    x = (drawn(2, rows, channels, seed=seed) * size).to(dtype)
    weight = drawn(channels, seed=seed + 1, dtype=weight_dtype)
    got = rms_norm(x, weight, 1e-5, offset, rounds)
    assert got.dtype == dtype
    assert got.shape == x.shape
    expected = exact_norm(x, weight, 1e-5, offset)
    tolerance = torch.finfo(dtype).eps * (0.51 + 0.51 * rounds) + 1e-6
    smallest = torch.finfo(dtype).smallest_normal * (weight.abs().max() + 2)
    assert ((got.double() - expected).abs() <= tolerance * expected.abs() + smallest).all()
    assert torch.equal(rms_norm(x[1, -1], weight, 1e-5, offset, rounds), got[1, -1])


@settings(max_examples=100)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 5),
    length=st.one_of(st.integers(1, 40), st.just(300)),
    size=st.sampled_from([16, 64, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention_is_that_of_softmax(
    batch: int, groups: int, shared: int, length: int, size: int, dtype: torch.dtype, masked: bool, seed: int
) -> None:
    query = drawn(batch, groups * shared, 1, size, seed=seed, dtype=dtype)
    key, value = (drawn(batch, groups, length, size, seed=seed + i, dtype=dtype) for i in (1, 2))
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 1, length, generator=torch.Generator().manual_seed(seed)) < 0.6
        mask[..., -1] = True
    assert not attend_refuses(query, key, value, mask)
    got = attend(query, key, value, mask, 0.2)
    assert got.dtype == dtype
    assert got.shape == (batch, 1, groups * shared, size)
    expected = exact_attention(query, key, value, mask, 0.2)
    off = (got.double() - expected).abs().amax()
    assert off <= (torch.finfo(dtype).eps / 2 + 3e-6) * expected.abs().amax()


def test_scores_far_apart_and_large_ones_keep_their_precision() -> None:
    query, key, value = drawn(1, 4, 1, 64), drawn(1, 2, 50, 64, seed=1), drawn(1, 2, 50, 64, seed=2)
    for size in (0.0, 1.0, 300.0):
        expected = exact_attention(query * size, key, value, None, 1.0)
        got = attend(query * size, key, value, None, 1.0).double()
        # A score of some thousands is only known to some 1e-4.
        assert (got - expected).norm() <= (1e-6 + 1e-6 * size) * expected.norm()


def test_strides_of_caches_and_queries_are_followed() -> None:
    query = drawn(2, 1, 8, 64, dtype=torch.bfloat16).transpose(1, 2)
    room = drawn(2, 2, 50, 64, seed=1, dtype=torch.bfloat16)
    key, value = room[:, :, 3:40], drawn(2, 37, 2, 64, seed=2, dtype=torch.bfloat16).transpose(1, 2)
    mask = (torch.arange(74) % 3 > 0).view(1, 1, 1, -1)[..., ::2].expand(2, 1, 1, 37)
    assert not attend_refuses(query, key, value, mask)
    got = attend(query, key, value, mask, 0.125)
    dense = (each.contiguous() for each in (query, key, value, mask))
    assert torch.equal(got, attend(*dense, 0.125))
    turned = query.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(attend(turned, key, value, mask, 0.125), got)


def test_what_the_mask_leaves_out_is_not_read() -> None:
    query, key, value = drawn(2, 4, 1, 32), drawn(2, 2, 20, 32, seed=1), drawn(2, 2, 20, 32, seed=2)
    mask = torch.rand(2, 1, 1, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = attend(query, key, value, mask, 0.2)
    out = ~mask.view(2, 1, 20, 1)
    spoiled = [each.masked_fill(out, torch.nan) for each in (key, value)]
    assert torch.equal(attend(query, *spoiled, mask, 0.2), expected)
    mask[1] = False
    nothing = attend(query, key, value, mask, 0.2)
    assert torch.equal(nothing[0], expected[0])
    assert (nothing[1] == 0).all()


def test_what_is_no_number_shows() -> None:
    query, key, value = drawn(1, 4, 1, 32), drawn(1, 2, 20, 32, seed=1), drawn(1, 2, 20, 32, seed=2)
    key[0, 0, 5, 3] = torch.nan
    got = attend(query, key, value, None, 0.2)[0, 0]
    assert got[:2].isnan().all()
    assert got[2:].isfinite().all()
    x = drawn(2, 64)
    x[0, 7] = torch.nan
    out = rms_norm(x, torch.ones(64), 1e-5)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_threads_change_nothing(two_threads: None) -> None:
    query = drawn(2, 8, 1, 64, dtype=torch.bfloat16)
    key, value = (drawn(2, 4, 900, 64, seed=i, dtype=torch.bfloat16) for i in (1, 2))
    x, weight = drawn(40, 2048, dtype=torch.bfloat16), drawn(2048)
    found = attend(query, key, value, None, 0.125), rms_norm(x, weight, 1e-5)
    torch.set_num_threads(1)
    assert torch.equal(found[0], attend(query, key, value, None, 0.125))
    assert torch.equal(found[1], rms_norm(x, weight, 1e-5))


def test_instruction_sets_agree_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = native._thread_pool()
    assert pool is not None
    check = native._Check(pool, cpu_native.is_right)
    results = []
    for name in native.available():
        library = native._open(name, check)
        assert isinstance(library, native.Native), library
        monkeypatch.setattr(cpu_decoding, "loaded", lambda library=library: library)
        for dtype in DTYPES:
            query = drawn(2, 6, 1, 80, dtype=dtype) * 3
            key, value = (drawn(2, 2, 37, 80, seed=i, dtype=dtype) for i in (1, 2))
            x, weight = drawn(3, 272, dtype=dtype), drawn(272, seed=1, dtype=dtype)
            results.append((attend(query, key, value, None, 0.3), rms_norm(x, weight, 1e-5)))
    for number, (first, second) in enumerate(results):
        assert torch.equal(first, results[number % 3][0])
        assert torch.equal(second, results[number % 3][1])


@pytest.mark.parametrize(
    "change",
    [
        {"query": drawn(1, 4, 2, 32)},
        {"query": drawn(1, 4, 1, 32).double()},
        {"query": drawn(1, 4, 1, 32).half()},
        {"query": drawn(1, 3, 1, 32)},
        {"query": drawn(1, 4, 1, 32).requires_grad_()},
        {"query": drawn(1, 4, 1, 32, dtype=torch.float32).to("meta")},
        {"key": drawn(2, 2, 9, 32), "value": drawn(2, 2, 9, 32)},
        {"value": drawn(1, 2, 9, 48)},
        {"key": drawn(1, 2, 32, 9).transpose(2, 3)},
        {"query": drawn(1, 4, 1, 24), "key": drawn(1, 2, 9, 24), "value": drawn(1, 2, 9, 24)},
        {"mask": torch.zeros(1, 1, 1, 9)},
        {"mask": torch.ones(1, 4, 1, 9, dtype=torch.bool)},
    ],
)
def test_what_attention_does_not_serve_it_refuses(change: dict[str, Tensor]) -> None:
    served = SimpleNamespace(
        query=drawn(1, 4, 1, 32), key=drawn(1, 2, 9, 32), value=drawn(1, 2, 9, 32), mask=None
    )
    assert not attend_refuses(**vars(served))
    assert attend_refuses(**vars(served) | change)


def test_it_agrees_with_pytorchs_attention() -> None:
    query, key, value = drawn(2, 4, 1, 64), drawn(2, 2, 30, 64, seed=1), drawn(2, 2, 30, 64, seed=2)
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.1, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(attend(query, key, value, None, 0.1), expected)

"""Experts in C++ against the same in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awq.errors import KernelError
from awq.kernels import cpu_experts, cpu_native, native
from awq.kernels.cpu_experts import CpuExperts, Expert
from awq.kernels.cpu_product import Product
from awq.weight import QuantizedWeight
from random_weights import random_weight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
CHANNELS, INSIDE = 64, 96

pytestmark = pytest.mark.usefixtures("native_library")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def digits(dtype: torch.dtype) -> int:
    return 3 if dtype is torch.float32 else 2


class Example:
    """Random experts, with their weights as they are."""

    def __init__(self, count: int, dtype: torch.dtype, activation: str = "silu", bias: bool = False) -> None:
        self.activation, self.dtype = activation, dtype
        self.weights: list[list[QuantizedWeight]] = []
        self.biases: list[list[Tensor | None]] = []
        for number in range(count):
            shapes = ((INSIDE, CHANNELS), (INSIDE, CHANNELS), (CHANNELS, INSIDE))
            seeds = range(3 * number, 3 * number + 3)
            self.weights.append([random_weight(*s, 16, seed=i) for s, i in zip(shapes, seeds, strict=True)])
            self.biases.append(
                [
                    drawn(rows, seed=i).to(dtype) if bias else None
                    for (rows, _), i in zip(shapes, seeds, strict=True)
                ]
            )

    def native(self) -> CpuExperts:
        experts = [
            Expert(
                *(
                    Product(cpu_native._prepare(cpu_native.loaded(), weight), bias)
                    for weight, bias in zip(weights, biases, strict=True)
                )
            )
            for weights, biases in zip(self.weights, self.biases, strict=True)
        ]
        return CpuExperts(experts, self.activation, self.dtype, digits(self.dtype))

    def exact(self, number: int, x: Tensor) -> Tensor:
        """One expert in float64."""

        def times(place: int, y: Tensor) -> Tensor:
            bias = self.biases[number][place]
            out = y @ self.weights[number][place].dequantize(torch.float64).t()
            return out if bias is None else out + bias.double()

        return times(2, ACTIVATIONS[self.activation](times(0, x)) * times(1, x))


def routing(tokens: int, each: int, count: int, seed: int) -> tuple[Tensor, Tensor, list[int]]:
    """Experts of each token, their shares, and those that are among them."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:each] for _ in range(tokens)])
    return chosen, torch.rand(tokens, each, generator=generator), sorted(set(chosen.flatten().tolist()))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 9),
    each=st.integers(1, 4),
    count=st.integers(4, 7),
    bias=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    wide_shares=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_sum_of_shares(
    tokens: int, each: int, count: int, dtype: torch.dtype, wide_shares: bool, seed: int, **rest: Any
) -> None:
    example = Example(count, dtype, **rest)
    x = drawn(tokens, CHANNELS, seed=seed).to(dtype)
    chosen, shares, hit = routing(tokens, each, count, seed)
    shares = shares if wide_shares else shares.to(dtype)
    got = example.native()(x, chosen, shares, hit)
    assert got.dtype is dtype
    assert got.shape == x.shape
    expected = torch.zeros(tokens, CHANNELS, dtype=torch.float64)
    for token, place in itertools.product(range(tokens), range(each)):
        out = example.exact(int(chosen[token, place]), x[token].double())
        expected[token] += float(shares[token, place]) * out
    close = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert ((got.double() - expected).norm(dim=1) <= close * expected.norm(dim=1)).all()


def test_threads_instruction_sets_and_company_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, pool = torch.get_num_threads(), native._thread_pool()
    assert pool is not None
    for dtype in DTYPES:
        example, x = Example(6, dtype), drawn(5, CHANNELS).to(dtype)
        chosen, shares, hit = routing(5, 3, 6, seed=1)
        ours, results = example.native(), []
        try:
            for name, threads in itertools.product(native.available(), (1, 2)):
                library = native._open(name, native._Check(pool, cpu_native.is_right))
                assert isinstance(library, native.Native), library
                monkeypatch.setattr(cpu_experts, "loaded", lambda library=library: library)
                torch.set_num_threads(threads)
                results.append(ours(x, chosen, shares, hit))
                alone = [
                    ours(x[i : i + 1], chosen[i : i + 1], shares[i : i + 1], sorted(chosen[i].tolist()))
                    for i in range(5)
                ]
                results.append(torch.cat(alone))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(each, results[0]) for each in results)


def test_nobody_chosen_is_nothing() -> None:
    x = drawn(1, CHANNELS)
    none = torch.zeros(1, 0)
    assert not Example(4, torch.float32).native()(x, none.long(), none, []).any()


def test_experts_of_other_shapes_are_refused() -> None:
    first, other = (Example(1, torch.float32).native().experts[0] for _ in range(2))
    with pytest.raises(KernelError, match="do not fit"):
        CpuExperts([first, other._replace(down=other.gate)], "silu", torch.float32, 3)

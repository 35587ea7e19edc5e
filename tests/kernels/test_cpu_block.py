"""A whole decoder block in C++ against the same in float64, and against the single products and norms."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awq.errors import KernelError
from awq.kernels import cpu_block, cpu_native, native
from awq.kernels.cpu_block import Around, Attention, CpuBlock, Norm
from awq.kernels.cpu_product import Product
from awq.weight import QuantizedWeight
from random_weights import random_weight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GATES = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
CHANNELS, INSIDE = 64, 96


pytestmark = pytest.mark.usefixtures("native_library")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Example:
    """A random block, with its weights as they are."""

    def __init__(
        self,
        heads: int = 4,
        groups: int = 2,
        size: int = 16,
        bits: int = 4,
        bias: bool = False,
        head_norms: str = "",
        activation: str = "silu",
        alone: bool = False,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.heads, self.groups, self.size, self.dtype = heads, groups, size, dtype
        rows = (heads + 2 * groups) * size
        shapes = {"qkv": (rows, CHANNELS), "out": (CHANNELS, heads * size), "wide": (2 * INSIDE, CHANNELS)}
        shapes["down"] = (CHANNELS, INSIDE)
        self.weights: dict[str, QuantizedWeight] = {}
        self.products = products = {}
        for number, (name, (outputs, inputs)) in enumerate(shapes.items()):
            weight = random_weight(outputs, inputs, 16, seed=seed + number, bits=bits)
            # Weights as large at all bits: with larger ones a rounding decides which token is attended to.
            weight.scales.mul_(2.0 ** (4 - bits))
            self.weights[name] = weight
            state = cpu_native._prepare(cpu_native.loaded(), weight)
            products[name] = Product(state, drawn(outputs, seed=seed + number, dtype=dtype) if bias else None)
        channels = {"": None, "head": (size, size), "all": (heads * size, groups * size)}[head_norms]
        query, keys = [None, None] if channels is None else [self.norm(n, seed) for n in channels]
        self.attention = Attention(
            query=query,
            keys=keys,
            qkv=products["qkv"],
            out=products["out"],
            starts=(0, heads * size, (heads + groups) * size),
            heads=heads,
            groups=groups,
            size=size,
            scale=0.1,
        )
        around = Around(
            first=self.norm(CHANNELS, seed + 1),
            second=self.norm(CHANNELS, seed + 2),
            wide=products["wide"],
            down=products["down"],
            starts=(INSIDE, 0),  # gate behind up
            activation=activation,
        )
        self.around: Around | None = None if alone else around

    def block(self) -> CpuBlock:
        return CpuBlock(self.attention, self.around, self.dtype, 3 if self.dtype is torch.float32 else 2)

    def norm(self, channels: int, seed: int) -> Norm:
        return Norm(drawn(channels, seed=seed, dtype=self.dtype), 1e-5, float(seed % 2), True)

    def inputs(self, batch: int, length: int, masked: bool, seed: int = 3) -> list[Any]:
        """What a block is called with; the room of keys and values is larger than they are."""
        x = drawn(batch, 1, CHANNELS, seed=seed, dtype=self.dtype)
        turn = drawn(1, 1, self.size, seed=seed, dtype=self.dtype)
        rotation = turn, turn.flip(-1)
        keys, values = (
            drawn(batch, self.groups, length + 3, self.size, seed=seed + i, dtype=self.dtype)[:, :, :length]
            for i in (1, 2)
        )
        mask = None
        if masked:
            mask = torch.rand(batch, 1, 1, length, generator=torch.Generator().manual_seed(seed)) < 0.6
            mask[..., -1] = True
        return [x, rotation, keys, values, mask]

    def expected(self, x: Tensor, rotation: Any, keys: Tensor, values: Tensor, mask: Any) -> Any:
        """Result, keys and values in float64."""
        parts, around, size = self.attention, self.around, self.size

        def times(name: str, y: Tensor) -> Tensor:
            bias = self.products[name].bias
            out = y @ self.weights[name].dequantize(torch.float64).t()
            return out if bias is None else out + bias.double()

        def normed(norm: Norm | None, y: Tensor) -> Tensor:
            if norm is None:
                return y
            rows = y.reshape(-1, norm.weight.numel())
            rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + norm.epsilon)
            return (rows * (norm.weight.double() + norm.offset)).view(y.shape)

        def turned(y: Tensor) -> Tensor:
            first, second = y.chunk(2, dim=-1)
            cosines, sines = (each.double() for each in rotation)
            return y * cosines + torch.cat((-second, first), dim=-1) * sines

        wide = x.double()[:, 0]
        rows = times("qkv", normed(around.first, wide) if around else wide)
        query, key, value = rows.split([n * size for n in (self.heads, self.groups, self.groups)], dim=-1)
        query, key = normed(parts.query, query), normed(parts.keys, key)
        query, key, value = (each.unflatten(-1, (-1, size)) for each in (query, key, value))
        keys = torch.cat((keys.double()[:, :, :-1], turned(key).unsqueeze(2)), dim=2)
        values = torch.cat((values.double()[:, :, :-1], value.unsqueeze(2)), dim=2)
        shared = self.heads // self.groups
        scores = (
            turned(query).unsqueeze(2) @ keys.repeat_interleave(shared, 1).transpose(-1, -2) * parts.scale
        )
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        attended = (scores.softmax(-1) @ values.repeat_interleave(shared, 1)).flatten(1)
        if around is None:
            return times("out", attended).unsqueeze(1), keys, values
        wide = wide + times("out", attended)
        up, gate = times("wide", normed(around.second, wide)).split(INSIDE, dim=-1)
        return (wide + times("down", GATES[around.activation](gate) * up)).unsqueeze(1), keys, values


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 4),
    size=st.sampled_from([16, 48, 64]),
    length=st.integers(1, 30),
    bits=st.sampled_from([2, 4, 8]),
    bias=st.booleans(),
    head_norms=st.sampled_from(["", "head", "all"]),
    activation=st.sampled_from(sorted(GATES)),
    alone=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_block_is_what_it_is_made_of(
    batch: int,
    groups: int,
    shared: int,
    length: int,
    masked: bool,
    seed: int,
    dtype: torch.dtype,
    **rest: Any,
) -> None:
    example = Example(groups * shared, groups, dtype=dtype, seed=seed, **rest)
    inputs = example.inputs(batch, length, masked, seed)
    expected = example.expected(*inputs)
    got = example.block()(*inputs)
    assert got.dtype == dtype
    assert got.shape == inputs[0].shape
    # A dozen roundings, of which the attention makes more of some.
    close = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for ours, exact in zip((got, *inputs[2:4]), expected, strict=True):
        assert (ours.double() - exact).norm() <= close * exact.norm()


def test_only_the_last_token_is_written() -> None:
    example = Example()
    x, rotation, keys, values, _ = example.inputs(2, 9, masked=False)
    rooms = [each._base for each in (keys, values)]
    before = [room.clone() for room in rooms]
    example.block()(x, rotation, keys, values, None)
    for room, old in zip(rooms, before, strict=True):
        changed = (room != old).any(-1).any(0).any(0)
        assert changed.nonzero().flatten().tolist() == [8]


def test_sequences_have_rotations_and_masks_of_their_own() -> None:
    example = Example()
    block = example.block()
    x, rotation, keys, values, mask = example.inputs(3, 7, masked=True)
    turns = tuple(torch.cat([i * each for i in (1, 2, 3)]) for each in rotation)
    apart = [
        block(
            x[i : i + 1],
            tuple(each[i : i + 1] for each in turns),
            keys[i : i + 1],
            values[i : i + 1],
            mask[i : i + 1],
        )
        for i in range(3)
    ]
    assert torch.equal(block(x, turns, keys, values, mask), torch.cat(apart))


def test_threads_and_instruction_sets_agree_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    before, pool = torch.get_num_threads(), native._thread_pool()
    assert pool is not None
    for dtype in DTYPES:
        example = Example(heads=8, groups=4, size=64, head_norms="head", bias=True, dtype=dtype)
        block = example.block()
        results = []
        try:
            for name, threads in itertools.product(native.available(), (1, 2)):
                library = native._open(name, native._Check(pool, cpu_native.is_right))
                assert isinstance(library, native.Native), library
                monkeypatch.setattr(cpu_block, "loaded", lambda library=library: library)
                torch.set_num_threads(threads)
                inputs = example.inputs(2, 700, masked=True)
                results.append((block(*inputs), *inputs[2:4]))
        finally:
            torch.set_num_threads(before)
        assert len(results) >= 2
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


def test_copies_have_their_own_memory() -> None:
    example = Example(bias=True)
    block = example.block()
    twin = copy.deepcopy(block)
    inputs = example.inputs(2, 7, masked=False)
    expected = block(*inputs)
    example.around.first.weight.zero_()
    assert torch.equal(twin(*inputs), expected)
    assert not torch.equal(block(*inputs), expected)


def test_what_does_not_lie_contiguously_is_refused() -> None:
    example = Example()
    attention, around = example.attention, example.around
    assert around is not None
    apart = drawn(CHANNELS, 2)[:, 0]
    turned = attention.out.state._replace(packed=attention.out.state.packed.transpose(2, 3))
    for changed in (
        (attention, around._replace(first=around.first._replace(weight=apart))),
        (attention._replace(out=attention.out._replace(bias=apart)), around),
        (attention._replace(out=attention.out._replace(state=turned)), None),
    ):
        with pytest.raises(KernelError, match="contiguously"):
            CpuBlock(*changed, torch.float32, 3)

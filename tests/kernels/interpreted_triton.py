"""Triton's programs on the CPU, under its interpreter. `test_triton.py` runs this with TRITON_INTERPRET=1.

bfloat16 is left to a GPU (`benchmarks/gpu_kernels.py`): the interpreter computes it wrongly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from test_kernels import exact, inputs_for, relative

from awq.kernels import triton_int4, triton_launch, triton_panel
from awq.kernels.triton_int4 import TritonInt4
from awq.kernels.triton_table import Device, Launch, launch_for
from awq.search import rounding
from awq.search.gram import InputStats
from awq.search.refine import move_panel, refine
from random_weights import random_weight

KERNEL = TritonInt4()
# Groups that fill a chunk of words, share it, cross it, and lie in a chunk that is not full.
SHAPES = [(64, 512, 128), (72, 512, 64), (40, 160, 32), (104, 192, 96), (64, 640, 640), (48, 768, 192)]


@pytest.mark.parametrize(("out", "columns", "group"), SHAPES)
# Rows on both sides of where another program or another tile is taken.
@pytest.mark.parametrize("rows", [1, 8, 9, 33, 65, 600])
def test_it_agrees_with_the_oracle(out: int, columns: int, group: int, rows: int) -> None:
    weight = random_weight(out, columns, group)
    inputs = inputs_for(rows, columns, torch.float16)
    got = KERNEL.forward(inputs, KERNEL.prepare(weight, torch.float16))
    assert got.dtype == torch.float16
    assert got.shape == (rows, out)
    assert relative(got, exact(weight, inputs)) < 6e-4


def test_float32_activations_are_multiplied_in_float32() -> None:
    weight, inputs = random_weight(64, 256, 64), inputs_for(3, 256, torch.float32)
    got = KERNEL.forward(inputs, KERNEL.prepare(weight, torch.float32))
    assert got.dtype == torch.float32
    assert relative(got, exact(weight, inputs)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("out", "columns", "group"), SHAPES)
def test_dequantizing_gives_the_very_floats(out: int, columns: int, group: int, dtype: torch.dtype) -> None:
    weight = random_weight(out, columns, group)
    got = KERNEL.dequantize(KERNEL.prepare(weight, dtype), dtype)
    assert torch.equal(got, weight.dequantize(dtype))


def test_each_column_and_each_code_is_where_it_belongs() -> None:
    """One input channel at a time, so that a permutation could not hide in a sum."""
    codes = (torch.arange(48)[:, None] * 7 + torch.arange(320)) % 16
    weight = dataclasses.replace(
        random_weight(48, 320, 32),
        codes=codes.to(torch.uint8),
        scales=torch.ones(48, 10, dtype=torch.float16),
        zeros=torch.zeros(48, 10, dtype=torch.uint8),
    )
    state = KERNEL.prepare(weight, torch.float16)
    for unit in torch.eye(320, dtype=torch.float16).split(64):
        got = KERNEL.forward(unit, state)
        assert torch.equal(got.t().to(torch.uint8), codes[:, unit.argmax(-1)].to(torch.uint8))


@pytest.fixture
def whole_processor() -> Iterator[None]:
    """As on a GPU with many processors, so that programs share sums."""
    before = triton_int4._device
    triton_int4._device = lambda device: Device(90, 132, 227 * 1024)  # type: ignore[assignment]
    yield
    triton_int4._device = before


@pytest.mark.usefixtures("whole_processor")
@pytest.mark.parametrize("rows", [9, 40])
def test_sums_shared_by_several_programs_are_complete_and_the_counters_are_left_at_zero(rows: int) -> None:
    weight = random_weight(72, 2048, 128)
    launch = launch_for(rows, 72, 2048, 64, triton_int4._device(torch.device("cpu")))
    assert launch is not None
    assert launch.split > 1
    state = KERNEL.prepare(weight, torch.float16)
    inputs = inputs_for(rows, 2048, torch.float16)
    first, second = (KERNEL.forward(inputs, state) for _ in range(2))
    assert relative(first, exact(weight, inputs)) < 6e-4
    assert torch.equal(first, second)
    assert not state.counters.any()


def test_a_share_may_have_less_to_do_than_the_others_or_nothing() -> None:
    weight, inputs = random_weight(64, 5 * 256, 128), inputs_for(20, 5 * 256, torch.float16)
    state = KERNEL.prepare(weight, torch.float16)
    for split in (2, 4, 8):
        launch = Launch(32, 64, 4, 3, split=split), False
        got = triton_launch.multiply(inputs, state, lambda *_, launch=launch: launch)
        assert relative(got, exact(weight, inputs)) < 6e-4


@pytest.mark.parametrize(("channels", "out"), [(1, 3), (24, 40)])
def test_a_panel_is_rounded_as_by_plain_pytorch(channels: int, out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, channels, generator=generator)
    upper = rounding.inverse_factor(inputs.t() @ inputs / 64)
    # Quarters of a step: many values lie half-way between two codes, and some outside of the range.
    rest = torch.randint(-20, 60, (channels, out), generator=generator) / 4
    scales = torch.rand(channels, out, generator=generator).round(decimals=0) + 1
    zeros = torch.randint(0, 16, (channels, out), generator=generator).float()
    expected, got = rest.clone(), rest.clone()
    plain = rounding.round_panel(expected, upper, scales, zeros, 15)
    assert torch.equal(triton_panel.round_panel(got, upper, scales, zeros, 15), plain)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("channels", "out"), [(1, 3), (24, 40)])
def test_codes_of_a_panel_move_as_by_plain_pytorch(channels: int, out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, channels, generator=generator)
    gram = inputs.t() @ inputs / 64
    codes = torch.randint(0, 16, (channels, out), generator=generator).float()
    scales = torch.rand(channels, out, generator=generator) + 0.5
    slope = gram @ (torch.randn(channels, out, generator=generator) * scales)
    expected, got = codes.clone(), codes.clone()
    moves = move_panel(expected, slope.clone(), gram, scales, 15)
    assert bool((expected != codes).any())
    assert torch.allclose(triton_panel.move_panel(got, slope.clone(), gram, scales, 15), moves)
    assert torch.equal(got, expected)


def test_a_layer_is_rounded_and_refined_as_by_plain_pytorch() -> None:
    """With the tensors that the search hands over, however they lie in memory; two panels."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 192, generator=generator) * (torch.rand(192, generator=generator) + 0.1)
    stats = InputStats((inputs.t() @ inputs / 400)[None], inputs.abs().mean(0), 400)
    weight = torch.randn(40, 192, generator=generator)
    settings = (weight, stats, *rounding.full_range(weight, 64), 4, torch.float16)
    plain, ours = rounding.gptq(*settings), rounding.gptq(*settings, triton_panel.round_panel)
    assert float((plain.codes == ours.codes).float().mean()) > 0.99
    moved = [refine(weight, stats, plain, 4, 2, mover).codes for mover in (None, triton_panel.move_panel)]
    assert float((moved[0] != plain.codes).float().mean()) > 0.02
    assert float((moved[0] == moved[1]).float().mean()) > 0.99

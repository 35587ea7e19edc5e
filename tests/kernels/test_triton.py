"""What the Triton kernel serves and arranges; its programs run in a process of their own, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_spec import spec
from hypothesis import given, settings
from hypothesis import strategies as st

from awq.errors import KernelError
from awq.kernels import choose, triton_int4, triton_launch
from awq.kernels.triton_int4 import TritonInt4
from awq.kernels.triton_table import DENSE_ROWS, Device, launch_for, most_tiles
from random_weights import random_weight

HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_the_programs_agree_with_the_oracle_under_the_interpreter() -> None:
    """The flag must be set before Triton is imported, hence a process."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_triton.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@settings(max_examples=40)
@given(
    out=st.integers(1, 70),
    group=st.integers(1, 6).map(lambda n: 32 * n),
    groups=st.integers(1, 4),
    scales=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_it_gives_back_the_very_codes_scales_and_zeros(
    out: int, group: int, groups: int, scales: torch.dtype, seed: int
) -> None:
    weight = random_weight(out, group * groups, group, seed, scales)
    kernel = TritonInt4()
    state = kernel.prepare(weight, torch.float16)
    assert torch.equal(kernel.codes(state), weight.codes)
    assert torch.equal(state.scales, weight.scales)
    assert state.scales.dtype == scales
    assert torch.equal(state.zeros, weight.zeros)


def test_a_weight_is_held_once() -> None:
    """Four bits a code and four bytes a group, counters aside."""
    state = TritonInt4().prepare(random_weight(256, 1024, 128), torch.float16)
    assert sum(part.nbytes for part in (state.words, state.pairs, state.low)) == 256 * (1024 // 2 + 4 * 8)


@pytest.fixture
def whole_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had all that Triton needs."""
    monkeypatch.setattr(triton_int4, "missing", lambda: None)


@pytest.mark.usefixtures("whole_machine")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "mps"}, "it runs on CUDA and ROCm devices, not on mps"),
        ({"group_size": 16}, "it takes groups of a multiple of 32, not 16"),
        ({"dtype": torch.float64}, "it multiplies float16, bfloat16 and float32, not float64"),
    ],
)
def test_what_it_does_not_serve_goes_to_the_oracle_with_the_reason(
    change: dict[str, object], reason: str
) -> None:
    choice = choose(spec(**change))
    assert choice.kernel.name == "torch"
    assert f"not triton: {reason}" in choice.reason
    with pytest.raises(KernelError, match="kernel 'triton' cannot serve this layer"):
        choose(spec(**change), "triton")


@pytest.mark.usefixtures("whole_machine")
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_taken_on_gpus(dtype: torch.dtype) -> None:
    choice = choose(spec(dtype=dtype))
    assert choice.kernel.name == "triton"
    assert choice.reason.startswith("triton: the fastest that serves 72x256, 4 bits in groups of 64")


def test_a_machine_without_triton_is_served_by_the_oracle_and_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_int4.importlib.util, "find_spec", lambda name: None)
    triton_int4.missing.cache_clear()
    try:
        choice = choose(spec())
    finally:
        triton_int4.missing.cache_clear()
    assert choice.kernel.name == "torch"
    assert "not triton: Triton is not installed (pip install triton" in choice.reason


H100 = Device(90, 132, 227 * 1024)
SMALL = Device(86, 28, 99 * 1024)
RADEON = Device(110, 96, 64 * 1024, hip=True)


@given(
    rows=st.integers(1, DENSE_ROWS - 1),
    out=st.integers(1, 200_000),
    groups=st.integers(1, 2000),
    plane=st.sampled_from([32, 64]),
    device=st.sampled_from([H100, SMALL, RADEON]),
)
def test_every_launch_fits_the_device_and_covers_the_product(
    rows: int, out: int, groups: int, plane: int, device: Device
) -> None:
    columns = 32 * groups
    launch = launch_for(rows, out, columns, plane, device)
    assert launch is not None
    if launch.side:
        assert rows <= launch.block_m
        stage = launch.side * (launch.block_n + 4 * launch.block_m) * plane * 2
    else:
        stage = (launch.block_n + 4 * launch.block_m) * plane * 2
        assert -(-rows // launch.block_m) * -(-out // launch.block_n) <= most_tiles(out)
    assert (launch.stages - 1) * stage < device.shared


def test_many_rows_are_left_to_the_dense_product(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, weight = TritonInt4(), random_weight(64, 256, 64)
    state = kernel.prepare(weight, torch.float16)
    monkeypatch.setattr(triton_int4, "multiply", lambda inputs, *_: inputs.new_zeros(len(inputs), 64))
    monkeypatch.setattr(TritonInt4, "dequantize", lambda self, state, dtype: weight.dequantize(dtype))
    fewer, many = (torch.ones(rows, 256, dtype=torch.float16) for rows in (DENSE_ROWS - 1, DENSE_ROWS))
    assert not kernel.forward(fewer, state).any()
    assert torch.equal(kernel.forward(many, state), many @ weight.dequantize(torch.float16).t())


def test_few_output_channels_are_shared_out_until_the_processors_are_busy() -> None:
    narrow, wide = (launch_for(16, out, 14336, 64, H100) for out in (1024, 28672))
    assert narrow is not None
    assert wide is not None
    assert narrow.split == 8
    assert wide.split == 1


def test_shares_of_a_sum_fill_the_last_turn_of_the_processors() -> None:
    """160 tiles leave 104 of 264 places empty; three shares each are 480, nearly two turns of a third."""
    assert launch_for(64, 10240, 8192, 64, H100).split == 3
    assert launch_for(64, 14336, 4096, 64, H100).split == 1


def test_few_programs_begin_early_and_many_do_not() -> None:
    assert launch_for(4, 6144, 4096, 64, H100).early
    assert not launch_for(4, 14336, 4096, 64, H100).early
    assert not launch_for(4, 6144, 4096, 64, SMALL).early


def test_the_programs_of_a_wide_merge_begin_early_if_all_of_them_run_at_once() -> None:
    assert launch_for(1, 28672, 4096, 64, H100).early
    assert not launch_for(1, 57344, 8192, 64, H100).early


class Compiled:
    """What Triton makes of a program, which notes what it is started with."""

    def __init__(self) -> None:
        self.starts: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.starts.append((grid, *arguments))


class Program:
    """A program for Triton to compile, which notes how it is called."""

    def __init__(self, arg_names: list[str]) -> None:
        self.arg_names, self.compiled = arg_names, Compiled()
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def call(*arguments: Any, **constants: Any) -> Compiled:
            named = dict(zip(self.arg_names, arguments, strict=False)) | constants
            self.calls.append((grid, *(named[name] for name in self.arg_names)))
            return self.compiled

        return call


@pytest.fixture(params=["few_rows", "many_rows"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Program:
    programs = pytest.importorskip("awq.kernels.triton_programs", reason="Triton is not installed")
    fake = Program(getattr(programs, request.param).arg_names)
    monkeypatch.setattr(programs, request.param, fake)
    monkeypatch.setattr(triton_launch, "_started", {})
    return fake


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> list[bool]:
    """Whether two starts were given alike, tensors by type and shape."""
    pairs = zip(one, other, strict=True)
    tensors = torch.Tensor
    return [(a.shape, a.dtype) == (b.shape, b.dtype) if isinstance(a, tensors) else a == b for a, b in pairs]


def test_a_product_that_has_run_is_started_as_triton_started_it(program: Program) -> None:
    rows = 1 if "SIDE" in program.arg_names else 20
    kernel = TritonInt4()
    state = kernel.prepare(random_weight(64, 256, 64), torch.float16)
    inputs = torch.randn(rows, 256, dtype=torch.float16)
    kernel.forward(inputs, state)
    kernel.forward(inputs, state)
    assert len(program.calls) == len(program.compiled.starts) == 1
    assert all(same(program.calls[0], program.compiled.starts[0]))


def test_what_triton_compiles_differently_for_is_left_to_it(program: Program) -> None:
    rows = 2 if "SIDE" in program.arg_names else 20
    kernel = TritonInt4()
    state = kernel.prepare(random_weight(64, 256, 64), torch.float16)
    memory = torch.randn((rows + 1) * 256, dtype=torch.float16)
    inputs = memory[: rows * 256].view(rows, 256)
    kernel.forward(inputs, state)
    kernel.forward(memory[1 : 1 + rows * 256].view(rows, 256), state)  # at an odd address
    kernel.forward(inputs.bfloat16(), state)
    kernel.forward(inputs[:-1], state)
    assert len(program.calls) == 4
    assert not program.compiled.starts

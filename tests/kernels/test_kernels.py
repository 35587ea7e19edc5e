"""Fast products against the plain one, codes recovered to the last, and choices that give their reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awq.errors import KernelError
from awq.kernels import LayerSpec, choose, kernel_names
from awq.kernels.cpu_int4 import CpuInt4
from awq.kernels.torch_dequant import TorchDequant
from awq.weight import QuantizedWeight
from random_weights import random_weight

ORACLE = TorchDequant()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs_for(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(weight: QuantizedWeight, inputs: torch.Tensor) -> torch.Tensor:
    """The product in float64."""
    return inputs.double() @ weight.dequantize().double().t()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("columns", "group"), [(64, 32), (96, 32), (128, 64), (256, 128), (512, 256), (70, 7)]
)
def test_the_oracle_is_right(columns: int, group: int, dtype: torch.dtype) -> None:
    weight = random_weight(24, columns, group)
    inputs = inputs_for(5, columns, dtype)
    got = ORACLE.forward(inputs, ORACLE.prepare(weight, dtype))
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert relative(got, exact(weight, inputs)) < tolerance


# Rows on both sides of where the fast kernel turns to a dense product.
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 33, 64, 383, 384, 385, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_kernel_agrees_with_the_oracle_for_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    kernel, weight = CpuInt4(), random_weight(64, 128, 64)
    inputs = inputs_for(rows, 128, dtype)
    got = kernel.forward(inputs, kernel.prepare(weight, dtype))
    assert got.dtype == dtype
    assert got.shape == (rows, 64)
    # It multiplies in bfloat16: eight bits of each factor.
    assert relative(got, exact(weight, inputs)) < 0.01


@settings(max_examples=40)
@given(
    out=st.integers(1, 14).map(lambda n: 16 * n),
    group=st.sampled_from([32, 64, 128, 256]),
    groups=st.integers(1, 3),
    rows=st.sampled_from([1, 5, 400]),
    dtype=st.sampled_from(DTYPES),
    scales=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_the_cpu_kernel_agrees_with_the_oracle_on_any_layer_it_serves(
    out: int, group: int, groups: int, rows: int, dtype: torch.dtype, scales: torch.dtype, seed: int
) -> None:
    kernel, weight = CpuInt4(), random_weight(out, group * groups, group, seed, scales)
    assert kernel.refuses(LayerSpec("cpu", dtype, group * groups, out, group)) is None
    inputs = inputs_for(rows, group * groups, dtype, seed)
    expected = ORACLE.forward(inputs.float(), ORACLE.prepare(weight, torch.float32)).double()
    assert relative(kernel.forward(inputs, kernel.prepare(weight, dtype)), expected) < 0.015


@settings(max_examples=40)
@given(
    out=st.integers(1, 14).map(lambda n: 16 * n),
    group=st.sampled_from([32, 64, 128]),
    groups=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_kernels_give_back_the_very_codes(out: int, group: int, groups: int, seed: int) -> None:
    weight = random_weight(out, group * groups, group, seed)
    for kernel in (CpuInt4(), ORACLE):
        state = kernel.prepare(weight, torch.float16)
        codes = kernel.codes(state)
        assert codes.dtype == torch.uint8
        assert torch.equal(codes, weight.codes), kernel.name
        assert torch.equal(state.scales, weight.scales)
        assert torch.equal(state.zeros, weight.zeros)


@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 100))
def test_the_oracle_gives_back_codes_of_odd_widths_too(rows: int, columns: int, seed: int) -> None:
    weight = random_weight(rows, columns, columns, seed)
    assert torch.equal(ORACLE.codes(ORACLE.prepare(weight, torch.float32)), weight.codes)


def test_each_column_and_each_code_is_where_it_belongs() -> None:
    """One input channel at a time, so that a permutation could not hide in a sum."""
    kernel = CpuInt4()
    codes = (torch.arange(96)[:, None] * 7 + torch.arange(64)) % 16
    scales, zeros = torch.ones(96, 2), torch.zeros(96, 2, dtype=torch.uint8)
    weight = QuantizedWeight(codes.to(torch.uint8), scales, zeros)
    got = kernel.forward(torch.eye(64, dtype=torch.bfloat16), kernel.prepare(weight, torch.bfloat16))
    assert torch.equal(got.t().to(torch.uint8), weight.codes)


@pytest.mark.parametrize("kernel", [CpuInt4(), ORACLE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(kernel: CpuInt4 | TorchDequant, dtype: torch.dtype) -> None:
    got = kernel.forward(torch.zeros(0, 64, dtype=dtype), kernel.prepare(random_weight(32, 64, 32), dtype))
    assert got.shape == (0, 32)
    assert got.dtype == dtype


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "runs on the CPU, not on cuda"),
        ({"bits": 8}, "8 bits do not fit a nibble"),
        ({"group_size": 16}, "takes groups of (32, 64, 128, 256), not 16"),
        ({"out_features": 72}, "72 output channels do not divide by 16"),
        ({"in_features": 48}, "48 input channels do not divide by 32"),
    ],
)
def test_what_the_cpu_kernel_does_not_serve_goes_to_another_with_the_reason(
    change: dict[str, object], reason: str
) -> None:
    fields = {
        "device": "cpu",
        "dtype": torch.float16,
        "in_features": 128,
        "out_features": 64,
        "group_size": 32,
    }
    spec = LayerSpec(**(fields | change))  # type: ignore[arg-type]
    assert choose(spec).kernel.name != "cpu-int4"
    with pytest.raises(KernelError, match="kernel 'cpu-int4' cannot serve this layer") as raised:
        choose(spec, "cpu-int4")
    assert reason in str(raised.value)


def test_what_no_fast_kernel_serves_goes_to_the_oracle_with_every_reason() -> None:
    choice = choose(LayerSpec("cpu", torch.bfloat16, 70, 64, 7))
    assert choice.kernel.name == "torch"
    assert "not cpu-w4a16: groups of 7 do not divide by 8" in choice.reason
    assert "not cpu-int4: it takes groups of (32, 64, 128, 256), not 7" in choice.reason


def test_the_fast_kernel_is_taken_where_it_serves_and_the_choice_says_so() -> None:
    choice = choose(LayerSpec("cpu", torch.bfloat16, 128, 64, 32))
    name = choice.kernel.name
    assert name in ("cpu-w4a16", "cpu-int4")
    told = f"{name}: the fastest that serves 64x128, 4 bits in groups of 32, bfloat16 on cpu"
    assert choice.reason.startswith(told)


def test_a_kernel_can_be_insisted_on() -> None:
    spec = LayerSpec("cpu", torch.float32, 128, 64, 32)
    assert choose(spec, "torch").kernel.name == "torch"
    assert choose(spec, "torch").reason == "torch: asked for"
    with pytest.raises(KernelError, match=r"kernel 'warp' is unknown; known are: .*cpu-int4.*torch"):
        choose(spec, "warp")
    assert {"cpu-int4", "torch"} <= set(kernel_names())


def test_a_layer_that_nothing_serves_is_an_error_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq.kernels.torch_dequant.TorchDequant.refuses", lambda self, spec: "switched off")
    with pytest.raises(KernelError, match=r"no kernel serves .*not cpu-int4: .*not torch: switched off"):
        choose(LayerSpec("cpu", torch.float32, 70, 64, 7))

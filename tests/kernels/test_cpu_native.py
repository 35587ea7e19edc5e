"""Our own C++ products against the dequantized weight in float64, for each instruction set there is here."""

from __future__ import annotations

import ctypes
import gc
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awq.errors import KernelError
from awq.kernels import LayerSpec, choose, cpu_native, native
from awq.kernels.cpu_native import CpuNative, CpuW4A8, _multiply, _prepare, memory
from awq.nn import QuantLinear
from awq.weight import QuantizedWeight
from random_weights import random_weight

KERNEL = CpuNative()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rounding the result to the dtype, and the activations' own precision before.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    found = cpu_native.load()
    if isinstance(found, str):
        pytest.skip(f"the C++ products cannot be used here: {found}")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs_for(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(weight: QuantizedWeight, inputs: Tensor) -> Tensor:
    shape = (weight.out_features, -1, weight.group_size)
    centred = weight.codes.view(shape).double() - weight.zeros.unsqueeze(-1).double()
    return inputs.double() @ (centred * weight.scales.unsqueeze(-1).double()).view(weight.codes.shape).t()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@settings(max_examples=150)
@given(
    out=st.integers(1, 200),
    group=st.sampled_from([8, 32, 40, 64, 96, 128, 136, 160, 256]),
    groups=st.integers(1, 3),
    rows=st.one_of(st.integers(1, 20), st.sampled_from([64, 241, 300])),
    dtype=st.sampled_from(DTYPES),
    scales=st.sampled_from(DTYPES),
    bits=st.integers(2, 8),
    seed=st.integers(0, 1000),
)
def test_any_layer_and_any_number_of_rows_agree_with_the_dequantized_weight(
    out: int,
    group: int,
    groups: int,
    rows: int,
    dtype: torch.dtype,
    scales: torch.dtype,
    bits: int,
    seed: int,
) -> None:
    weight = random_weight(out, group * groups, group, seed, scales, bits)
    assert KERNEL.refuses(LayerSpec("cpu", dtype, group * groups, out, group, bits)) is None
    inputs = inputs_for(rows, group * groups, dtype, seed)
    state = KERNEL.prepare(weight, dtype)
    got = KERNEL.forward(inputs, state)
    assert got.dtype == dtype
    assert got.shape == (rows, out)
    # Where terms cancel, what is left of a single sum may be as small as its error.
    expected = exact(weight, inputs)
    terms = inputs.double().abs() @ weight.dequantize().double().abs().t()
    off = float((got.double() - expected).abs().max())
    # Rounding alone may take a single result half a unit of its last place away.
    assert off < (TOLERANCE[dtype] + torch.finfo(dtype).eps / 2) * float(terms.max())
    assert rows * out < 64 or relative(got, expected) < TOLERANCE[dtype]
    assert torch.equal(KERNEL.codes(state), weight.codes)
    assert torch.equal(state.scales, weight.scales)
    assert torch.equal(state.zeros, weight.zeros)


@pytest.mark.parametrize("zero", [0, 15])
@pytest.mark.parametrize("code", [0, 15])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_the_range_of_codes_and_zero_points(code: int, zero: int, dtype: torch.dtype) -> None:
    weight = QuantizedWeight(
        torch.full((24, 256), code, dtype=torch.uint8),
        torch.full((24, 2), 0.01),
        torch.full((24, 2), zero, dtype=torch.uint8),
    )
    inputs = torch.full((4, 256), 127.0).to(dtype)
    got = KERNEL.forward(inputs, KERNEL.prepare(weight, dtype)).double()
    expected = exact(weight, inputs)
    assert float((got - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


def test_each_column_and_each_code_is_where_it_belongs() -> None:
    """One input channel at a time, so that a permutation could not hide in a sum."""
    for bits, dtype in itertools.product((4, 8), DTYPES):
        codes = ((torch.arange(136)[:, None] * 7 + torch.arange(64) * 13) % (1 << bits)).to(torch.uint8)
        weight = QuantizedWeight(codes, torch.ones(136, 2), torch.zeros(136, 2, dtype=torch.uint8), bits)
        got = KERNEL.forward(torch.eye(64, dtype=dtype), KERNEL.prepare(weight, dtype))
        assert torch.equal(got.t().to(torch.uint8), codes)


def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(threads: int) -> None:
    for kernel, dtype in itertools.product((KERNEL, CpuW4A8()), DTYPES):
        state = kernel.prepare(random_weight(200, 512, 128), dtype)
        inputs = inputs_for(300, 512, dtype)
        together = kernel.forward(inputs, state)
        alone = torch.cat([kernel.forward(inputs[i : i + 1], state) for i in (0, 1, 150, 299)])
        assert torch.equal(together[[0, 1, 150, 299]], alone)
        torch.set_num_threads(1)
        assert torch.equal(kernel.forward(inputs, state), together)
        torch.set_num_threads(threads)


def test_instruction_sets_agree_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of this machine's is compiled, so that the slower ones are tested too."""
    pool = native._thread_pool()
    assert pool is not None
    check = native._Check(pool, cpu_native.is_right)
    found = [native._open(name, check) for name in native.available()]
    assert all(isinstance(library, native.Native) for library in found), found
    for bits, dtype, digits, rows in itertools.product((4, 8), DTYPES, (1, 2, 3), (1, 3, 9, 100)):
        weight = random_weight(200, 480, 160, bits=bits)
        weight.codes[7] = (1 << bits) - 1
        inputs = inputs_for(rows, 480, dtype)
        inputs[0] = 127  # whose second smallest digit is -128: the largest sums there are
        results = [_multiply(library, inputs, _prepare(library, weight), digits) for library in found]
        for library, result in zip(found, results, strict=True):
            assert torch.equal(result, results[0]), library


def test_tiles_give_the_same_bits(tmp_path: Path) -> None:
    """With AMX's instructions written out in C++, so that their use is tested on any processor with VNNI."""
    name, compiler = "avx512-vnni", native.compiler()
    if name not in native.available() or compiler is None:
        pytest.skip("needs a processor with AVX512 and VNNI, and a compiler")
    header = Path(__file__).parent / "emulated_amx.h"
    source = native._SOURCES / "w4.cpp"
    command = [compiler, *native._OPTIONS, *native._flags(name), "-include", str(header), "-D__AMX_INT8__=1"]
    subprocess.run([*command, str(source), "-o", str(tmp_path / "tiles.so")], check=True)
    library = ctypes.CDLL(str(tmp_path / "tiles.so"))
    native._declare(library)
    tiles, plain = native.Native(library, "tiles"), cpu_native.load()
    assert isinstance(plain, native.Native)
    layers = ((200, 480, 160, 4), (64, 256, 128, 4), (72, 96, 32, 8), (130, 40, 8, 4))
    for out, columns, group, bits in layers:
        weight = random_weight(out, columns, group, bits=bits)
        for rows, digits in itertools.product((1, 7, 8, 11, 16, 33, 241), (1, 2, 3)):
            inputs = inputs_for(rows, columns, torch.float32)
            got = _multiply(tiles, inputs, _prepare(tiles, weight), digits)
            assert torch.equal(got, _multiply(plain, inputs, _prepare(plain, weight), digits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_repeated_rows_are_read_right(dtype: torch.dtype) -> None:
    state = KERNEL.prepare(random_weight(48, 128, 64), dtype)
    wide = inputs_for(10, 256, dtype)
    for view in (wide[:, :128], wide[::2, 128:], wide[:, ::2], wide[:1, :128].expand(5, 128)):
        assert torch.equal(KERNEL.forward(view, state), KERNEL.forward(view.contiguous(), state))
    turned = inputs_for(128, 7, dtype).t()
    assert torch.equal(KERNEL.forward(turned, state), KERNEL.forward(turned.contiguous(), state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    got = KERNEL.forward(torch.zeros(0, 64, dtype=dtype), KERNEL.prepare(random_weight(40, 64, 32), dtype))
    assert got.shape == (0, 40)
    assert got.dtype == dtype


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e30])
def test_activations_of_any_size_keep_their_precision(scale: float) -> None:
    weight = random_weight(48, 128, 64, dtype=torch.float32)
    inputs = inputs_for(5, 128, torch.float32).double() * scale
    inputs = inputs.float()
    got = KERNEL.forward(inputs, KERNEL.prepare(weight, torch.float32)).double()
    difference = float((got - exact(weight, inputs)).abs().max())
    # What is smaller than float32's smallest normal number counts as 0.
    assert difference <= 1e-6 * scale * 16 + 1e-37


def test_an_outlier_leaves_other_groups_exact_and_its_own_close() -> None:
    weight, inputs = random_weight(48, 256, 128), inputs_for(5, 256, torch.bfloat16)
    inputs[:, 3] = 1000.0
    weight.codes[:, 3] = weight.zeros[:, 0]  # the outlier meets a weight of 0, so that only its error shows
    got = KERNEL.forward(inputs, KERNEL.prepare(weight, torch.bfloat16))
    assert relative(got, exact(weight, inputs)) < 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_what_is_no_number_becomes_nan_and_leaves_the_others_alone(value: float) -> None:
    state = KERNEL.prepare(random_weight(48, 128, 64), torch.float32)
    inputs = inputs_for(5, 128, torch.float32)
    expected = KERNEL.forward(inputs, state)
    inputs[2, 100] = value
    for kernel in (KERNEL, CpuW4A8()):
        got = kernel.forward(inputs, state)
        assert got[2].isnan().all()
        assert got[[0, 1, 3, 4]].isfinite().all()
    assert torch.equal(KERNEL.forward(inputs, state)[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bit_activations_are_off_by_under_a_percent_and_only_on_request(dtype: torch.dtype) -> None:
    kernel, weight, inputs = CpuW4A8(), random_weight(96, 512, 128), inputs_for(9, 512, dtype)
    off = relative(kernel.forward(inputs, kernel.prepare(weight, dtype)), exact(weight, inputs))
    assert TOLERANCE[dtype] < off < 0.01
    spec = LayerSpec("cpu", dtype, 512, 96, 128)
    assert choose(spec).kernel.name == "cpu-w4a16"
    assert choose(spec, "cpu-w4a8").kernel.name == "cpu-w4a8"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "it runs on the CPU, not on cuda"),
        ({"group_size": 12}, "groups of 12 do not divide by 8"),
    ],
)
def test_what_it_does_not_serve_it_refuses_with_the_reason(change: dict[str, object], reason: str) -> None:
    fields = {
        "device": "cpu",
        "dtype": torch.float16,
        "in_features": 96,
        "out_features": 64,
        "group_size": 32,
    }
    spec = LayerSpec(**(fields | change))  # type: ignore[arg-type]
    assert KERNEL.refuses(spec) == reason
    with pytest.raises(KernelError, match=f"kernel 'cpu-w4a16' cannot serve this layer: {reason}"):
        choose(spec, "cpu-w4a16")


def test_float64_activations_are_served_in_float32() -> None:
    weight, inputs = random_weight(48, 128, 64), inputs_for(3, 128, torch.float32).double()
    got = KERNEL.forward(inputs, KERNEL.prepare(weight, torch.float32))
    assert got.dtype == torch.float64
    assert relative(got, exact(weight, inputs)) < 1e-6


def test_a_state_whose_tensors_were_made_anew_still_multiplies_right() -> None:
    weight, inputs = random_weight(48, 128, 64), inputs_for(3, 128, torch.float32)
    state = KERNEL.prepare(weight, torch.float32)
    turned = (part.t().contiguous().t() if getattr(part, "ndim", 0) == 2 else part for part in state)
    anew = type(state)(*turned)
    assert not anew.scales_by_group.is_contiguous()
    assert torch.equal(KERNEL.forward(inputs, anew), KERNEL.forward(inputs, state))


def test_a_compiled_layer_gives_the_values_of_a_plain_one_and_gradients_too() -> None:
    layer = QuantLinear.from_weight(random_weight(48, 128, 64))
    assert layer.prepare(torch.float32).kernel.name == "cpu-w4a16"
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = inputs_for(5, 128, torch.float32).requires_grad_()
    out = compiled(inputs)
    assert torch.equal(out, layer(inputs))
    out.sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, layer.dequantize().sum(0).expand(5, -1))


@pytest.mark.parametrize("size", [100, (2 << 20) - 1, 2 << 20, (5 << 20) + 4096])
def test_memory_for_codes_starts_where_a_large_page_does_and_ends_with_them(size: int) -> None:
    taken = memory(size)
    assert taken.shape == (size,)
    assert taken.dtype == torch.uint8
    taken.fill_(7)
    if sys.platform == "linux" and size >= 2 << 20:
        assert taken.data_ptr() % (2 << 20) == 0
        assert large_pages(taken.data_ptr()) in (0, size >> 21 << 21)  # none where the system has none


def large_pages(address: int) -> int:
    """Bytes in large pages of the mapping that starts at an address."""
    text = Path("/proc/self/smaps").read_text().split(f"{address:x}-", 1)
    line = next(line for line in text[1].splitlines() if line.startswith("AnonHugePages")) if text[1:] else ""
    return int(line.split()[1]) << 10 if line else 0


@pytest.mark.parametrize("lacking", ["mappings", "large pages", "room for one more"])
def test_memory_for_codes_is_had_without_large_pages_too(
    lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError

    if lacking == "mappings":
        monkeypatch.setattr(cpu_native.mmap, "mmap", refuse)
    elif lacking == "large pages":
        monkeypatch.delattr(cpu_native.mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(cpu_native, "_MOST_HUGE", 0)
    assert memory(3 << 20).fill_(7).sum() == 7 * (3 << 20)


def test_large_layers_multiply_right_and_give_their_memory_back() -> None:
    weight, inputs = random_weight(2048, 2080, 32), inputs_for(3, 2080, torch.float32)
    state = KERNEL.prepare(weight, torch.float32)
    assert relative(KERNEL.forward(inputs, state), exact(weight, inputs)) < 1e-6
    assert torch.equal(KERNEL.codes(state), weight.codes)
    del state
    gc.collect()
    before = resident()
    for _ in range(20):
        memory(8 << 20).fill_(1)
    assert resident() < before + (32 << 20)


def resident() -> int:
    """Bytes of this process in memory, on Linux."""
    try:
        text = Path("/proc/self/statm").read_text()
    except OSError:
        pytest.skip("only Linux tells")
    return int(text.split()[1]) * 4096

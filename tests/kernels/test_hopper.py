"""What the programs for Hopper GPUs serve, how a weight lies for them and how they are launched and compiled.

What they compute is checked in an emulator (`test_hopper_emulated.py`), and here where there is such a GPU.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import gpu_spec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awq.errors import KernelError
from awq.kernels import choose, cuda_program, hopper, operator, triton_int4
from awq.kernels.hopper import Hopper, missing
from awq.kernels.hopper_launch import DENSE_ROWS, Launch, Shape, launch_for, most_tiles
from awq.kernels.hopper_layout import block_bytes, pack, parts_of
from random_weights import random_weight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUPS = (32, 64, 128, 256)
PROCESSORS = 132
# Bytes of shared memory of a program, and of a processor.
MOST_SHARED, PROCESSOR_SHARED = 227 * 1024, 228 * 1024


@settings(max_examples=30)
@given(
    tiles=st.integers(1, 5),
    group=st.sampled_from(GROUPS),
    blocks=st.integers(1, 4),
    scales=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_it_gives_back_the_very_codes_scales_and_zeros(
    tiles: int, group: int, blocks: int, scales: torch.dtype, seed: int
) -> None:
    weight = random_weight(16 * tiles, max(group, 128) * blocks, group, seed, scales)
    kernel = Hopper()
    state = kernel.prepare(weight, torch.float16)
    assert torch.equal(kernel.codes(state), weight.codes)
    assert torch.equal(state.scales, weight.scales)
    assert state.scales.dtype == scales
    assert torch.equal(state.zeros, weight.zeros)


def test_a_weight_is_held_once() -> None:
    """Four bits a code and four bytes a group, counters aside."""
    state = Hopper().prepare(random_weight(256, 1024, 128), torch.float16)
    assert state.blocks.nbytes == 256 * (1024 // 2 + 4 * 8)
    assert state.low.nbytes == 0


@pytest.mark.parametrize("group", GROUPS)
def test_codes_lie_as_the_threads_of_a_warp_hold_them(group: int) -> None:
    weight = random_weight(48, 512, group)
    pairs = torch.arange(48 * 512 // group, dtype=torch.int32).view(48, -1)
    blocks = pack(weight.codes, pairs, group)
    assert blocks.shape == (3, 4, block_bytes(parts_of(group)))
    words = blocks[2, 1, :1024].contiguous().view(torch.int32).view(2, 32, 4)
    for half, thread, step, nibble in itertools.product(range(2), (0, 6, 31), range(4), range(8)):
        g, t = thread // 4, thread % 4
        row = 32 + g + 8 * (nibble % 2)
        column = 128 + 64 * half + 16 * step + 2 * t + 8 * (nibble // 2 % 2) + nibble // 4
        word = int(words[half, thread, step])
        assert word >> 4 * nibble & 15 == int(weight.codes[row, column])
    found = blocks[2, 1, 1024:].contiguous().view(torch.int32).view(-1, 16)
    for part in range(parts_of(group)):
        assert torch.equal(found[part], pairs[32:, (128 + part * min(group, 128)) // group])


spec = functools.partial(gpu_spec.spec, out_features=64)


@pytest.fixture
def whole_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had a Hopper GPU and all that is needed."""
    monkeypatch.setattr(hopper, "missing", lambda: None)
    monkeypatch.setattr(triton_int4, "missing", lambda: None)


@pytest.mark.usefixtures("whole_machine")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"group_size": 96, "in_features": 384}, "it takes groups of 32, 64 or a multiple of 128, not 96"),
        ({"dtype": torch.float32}, "it multiplies float16 and bfloat16, not float32"),
        ({"out_features": 72}, "72 output channels do not divide by 16"),
        ({"in_features": 192}, "192 input channels do not divide by 128"),
    ],
)
def test_what_it_does_not_serve_goes_to_triton_with_the_reason(
    change: dict[str, object], reason: str
) -> None:
    choice = choose(spec(**change))
    assert choice.kernel.name == "triton"
    assert f"not hopper: {reason}" in choice.reason
    with pytest.raises(KernelError, match="kernel 'hopper' cannot serve this layer"):
        choose(spec(**change), "hopper")


@pytest.mark.usefixtures("whole_machine")
@pytest.mark.parametrize("change", [{}, {"dtype": torch.bfloat16}, {"group_size": 256}, {"group_size": 32}])
def test_it_is_the_first_choice_on_hopper_gpus(change: dict[str, object]) -> None:
    assert choose(spec(**change)).kernel.name == "hopper"


@pytest.mark.usefixtures("whole_machine")
def test_eight_bits_are_left_to_others() -> None:
    assert "not hopper: 8 bits do not fit a nibble" in choose(spec(bits=8)).reason


@pytest.mark.parametrize(("capability", "reason"), [((9, 0), None), ((10, 0), "not for 10.0")])
def test_it_is_for_one_kind_of_gpu(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_program, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability if index else (9, 0))
    found = missing()
    assert (found is None) if reason is None else (found is not None and found.endswith(reason))


def test_what_cuda_programs_lack_it_lacks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_program, "missing", lambda: "cuda-bindings is not installed")
    assert missing() == "cuda-bindings is not installed"


shapes = st.builds(
    Shape,
    out_features=st.integers(1, 4000).map(lambda n: 16 * n),
    in_features=st.integers(1, 400).map(lambda n: 128 * n),
    parts=st.sampled_from([1, 2, 4]),
)


@given(rows=st.integers(1, DENSE_ROWS - 1), shape=shapes, processors=st.integers(1, 200))
def test_every_launch_fits_the_device_and_covers_the_product(
    rows: int, shape: Shape, processors: int
) -> None:
    launch = launch_for(rows, shape, True, processors)
    constants = dict(launch.constants)
    assert 1 <= launch.programs <= processors
    assert launch.shared <= MOST_SHARED
    assert constants["PARTS"] == shape.parts
    if launch.program == "few_rows":
        assert rows <= constants["ROWS"]
        assert launch.programs <= shape.out_features // 16
        return
    tiles = -(-shape.out_features // (64 * constants["GROUPS"])) * -(-rows // constants["ROWS"])
    assert tiles <= most_tiles(shape.out_features)
    assert launch.programs <= tiles * (shape.in_features // 128)
    assert launch.threads == 128 * (constants["GROUPS"] + 1)
    assert launch.block_rows == constants["ROWS"]
    assert constants["STAGES"] >= 2
    # Two tiles of each program may be shared.
    assert launch.partial == 2 * launch.programs * 64 * constants["GROUPS"] * constants["ROWS"]


def test_single_tokens_leave_room_for_the_next_launch() -> None:
    for shape in (Shape(28672, 4096, 1), Shape(4096, 4096, 1), Shape(4096, 14336, 1)):
        assert launch_for(1, shape, True, PROCESSORS).shared <= PROCESSOR_SHARED // 2 - 1024


def test_few_rows_of_a_long_layer_do_not_fit_and_are_computed_as_many() -> None:
    assert launch_for(8, Shape(4096, 4096, 1), True, PROCESSORS).program == "few_rows"
    assert launch_for(8, Shape(4096, 14336, 1), True, PROCESSORS).program == "many_rows"


class Started:
    """In place of the GPU: notes what is started, and how."""

    def __init__(self) -> None:
        self.loaded: list[tuple[Any, ...]] = []
        self.started: list[tuple[Any, ...]] = []

    def load(self, *arguments: Any) -> Callable[..., None]:
        self.loaded.append(arguments)

        def start(*arguments: Any, early: bool, structure: int = 0) -> None:
            self.started.append((*arguments, early, structure))

        return start


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Started:
    """A GPU that takes tensors of the CPU, and does nothing."""
    fake = Started()
    monkeypatch.setattr(cuda_program, "load", fake.load)
    monkeypatch.setattr(
        cuda_program, "rows_map", lambda *measures: type("Map", (), {"getPtr": lambda self: 4711})()
    )
    monkeypatch.setattr(hopper, "_processors", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(hopper, "_started", {})
    hopper._starter.cache_clear()
    return fake


def test_a_product_starts_its_program_with_its_tensors_and_measures(gpu: Started) -> None:
    kernel, weight = Hopper(), random_weight(64, 256, 64)
    state = kernel.prepare(weight, torch.bfloat16)
    inputs = torch.randn(3, 256, dtype=torch.bfloat16)
    out = kernel.forward(inputs, state)
    assert out.shape == (3, 64)
    assert out.dtype == torch.bfloat16
    (started,) = gpu.started
    pointers = (state.blocks.data_ptr(), inputs.data_ptr(), out.data_ptr())
    assert started == ((4, 1, 1), 544, (*pointers, 3, 64, 256), True, 0)
    (loaded,) = gpu.loaded
    assert loaded[:3] == ("few_rows.cu", "few_rows", {"BF16": 1, "PARTS": 2, "ROWS": 4, "STAGES": 5})
    kernel.forward(inputs, state)
    assert len(gpu.loaded) == 1


def test_programs_that_share_sums_get_room_for_them_and_the_map_of_the_activations(gpu: Started) -> None:
    kernel, weight = Hopper(), random_weight(64, 256, 128)
    state = kernel.prepare(weight, torch.float16)
    inputs = torch.randn(20, 256, dtype=torch.float16)
    out = kernel.forward(inputs, state)
    ((grid, threads, arguments, early, structure),) = gpu.started
    assert (grid, threads, early, structure) == ((2, 1, 1), 512, True, 4711)
    assert arguments[:2] == (state.blocks.data_ptr(), out.data_ptr())
    assert arguments[3:] == (state.counters.data_ptr(), 20, 64, 256)
    assert gpu.loaded[0][0] == "many_rows.cu"
    assert gpu.loaded[0][2]["ROWS"] == 32


def test_activations_that_lie_askew_are_moved(gpu: Started) -> None:
    kernel = Hopper()
    state = kernel.prepare(random_weight(64, 256, 128), torch.float16)
    askew = torch.zeros(257, dtype=torch.float16)[1:].view(1, 256)
    assert askew.data_ptr() % 16
    kernel.forward(askew, state)
    assert gpu.started[0][2][1] % 16 == 0


@pytest.mark.parametrize("rows", [DENSE_ROWS - 1, DENSE_ROWS])
def test_many_rows_are_left_to_the_dense_product(
    rows: int, gpu: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, weight = Hopper(), random_weight(64, 256, 64)
    state = kernel.prepare(weight, torch.float16)
    monkeypatch.setattr(Hopper, "dequantize", lambda self, state, dtype: weight.dequantize(dtype))
    inputs = torch.randn(rows, 256, dtype=torch.float16)
    out = kernel.forward(inputs, state)
    assert len(gpu.started) == (rows < DENSE_ROWS)
    if rows == DENSE_ROWS:
        assert torch.equal(out, inputs @ weight.dequantize(torch.float16).t())


def test_activations_of_another_type_get_the_weight_as_floats(gpu: Started) -> None:
    kernel, weight = Hopper(), random_weight(64, 256, 64)
    state = kernel.prepare(weight, torch.float16)
    inputs = torch.randn(2, 256)
    assert torch.equal(kernel.forward(inputs, state), inputs @ weight.dequantize().t())
    assert not gpu.started


def test_the_weight_is_written_out_by_its_own_program(gpu: Started) -> None:
    kernel = Hopper()
    state = kernel.prepare(random_weight(64, 1280, 32), torch.float16)
    out = kernel.dequantize(state, torch.bfloat16)
    assert (out.shape, out.dtype) == ((64, 1280), torch.bfloat16)
    assert gpu.loaded[0][:3] == ("dequantize.cu", "dequantize", {"BF16": 1, "PARTS": 4})
    assert gpu.started == [((5, 1, 1), 256, (state.blocks.data_ptr(), out.data_ptr(), 40, 10), True, 0)]


def test_no_rows_are_no_launch(gpu: Started) -> None:
    kernel = Hopper()
    state = kernel.prepare(random_weight(64, 256, 64), torch.float16)
    assert kernel.forward(torch.empty(0, 256, dtype=torch.float16), state).shape == (0, 64)
    assert not gpu.started


def launches() -> list[Launch]:
    """Those of all kinds: sizes of batches, small and large layers, groups."""
    found = {Launch("dequantize", (("BF16", 1), ("PARTS", parts)), 1, 256, 0) for parts in (1, 4)}
    shapes = (Shape(4096, 4096, 1), Shape(28672, 4096, 1), Shape(4096, 4096, 2), Shape(28672, 4096, 4))
    for shape, rows in itertools.product(shapes, (1, 2, 4, 8, 9, 32, 64, 128)):
        found.add(launch_for(rows, shape, rows not in (2, 32), PROCESSORS))
    return sorted(found, key=lambda launch: (launch.program, launch.constants))


@pytest.mark.usefixtures("nvrtc")
def test_every_program_is_compiled_without_spilling_or_waiting_for_each_product() -> None:
    """For this no GPU is needed. Programs that spill, or whose products the compiler serializes, are slow."""
    for launch in launches():
        compiled = cuda_program.compile_program(f"{launch.program}.cu", dict(launch.constants), 90)
        spilled = re.search(r"(\d+) bytes spill stores", compiled.log)
        registers = re.search(r"Used (\d+) registers", compiled.log)
        assert spilled is not None
        assert registers is not None
        assert spilled[1] == "0", f"{launch}: {compiled.log}"
        assert "serialized" not in compiled.log, f"{launch}: {compiled.log}"
        assert int(registers[1]) * launch.threads <= 65536, launch
        if launch.program == "few_rows":  # two fit on a processor
            assert int(registers[1]) * launch.threads <= 32768, launch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("out", "columns", "group"), [(208, 1152, 128), (64, 512, 32), (4096, 4096, 256)])
def test_products_agree_with_the_oracle(out: int, columns: int, group: int, dtype: torch.dtype) -> None:
    if reason := missing():
        pytest.skip(reason)
    weight = random_weight(out, columns, group)
    on_gpu = type(weight)(*(part.cuda() for part in (weight.codes, weight.scales, weight.zeros)))
    kernel = Hopper()
    state = kernel.prepare(on_gpu, dtype)
    exact = on_gpu.dequantize().double().t()
    assert torch.equal(kernel.dequantize(state, dtype), on_gpu.dequantize(dtype))
    for rows in (1, 2, 3, 8, 9, 33, 64, 128, 300, DENSE_ROWS):
        inputs = torch.randn(rows, columns, device="cuda").to(dtype)
        got, expected = kernel.forward(inputs, state), inputs.double() @ exact
        error = float((got.double() - expected).norm() / expected.norm())
        assert error < (6e-4 if dtype == torch.float16 else 4e-3), rows
        assert torch.equal(got, operator.multiply(inputs, kernel, state, out)), rows
    assert not state.counters.any()

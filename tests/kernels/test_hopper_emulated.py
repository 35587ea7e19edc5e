"""The CUDA programs for Hopper GPUs, compiled by g++ and run thread by thread in an emulator.

They are the very sources that GPUs get, with `emulated_hopper.h` in place of their headers, and the very
Python launches them. The emulator fails where threads wait for ever, and has no numbers where something is
read that nobody has waited for: mistakes show that a GPU would mostly forgive.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from awq.kernels import cuda_program, hopper, hopper_launch
from awq.kernels.hopper import Hopper
from awq.kernels.hopper_layout import block_bytes
from random_weights import random_weight

OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-fno-strict-aliasing", "-w")
HERE = Path(__file__).parent
# What each byte is that nobody has written.
NO_NUMBER = bytes([255])
PAGE = mmap.PAGESIZE
FORWARDS, BACKWARDS, SHUFFLED = 0, 1, 2
BF16, FP16 = torch.bfloat16, torch.float16


class Map(ctypes.Structure):
    """Where the copy engine finds activations."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "box_rows")),
    )

    def getPtr(self) -> int:  # noqa: N802
        return ctypes.addressof(self)


class Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("programs", "threads", "shared", "order")),
        ("inputs", Range),
        ("weight", Range),
        ("written", Range * 3),
    )


class Buffer:
    """A tensor in memory of its own, between pages that nobody may touch."""

    def __init__(self, address: int, size: int, holds: bool = True) -> None:
        self.address, self.size = address, size
        self.pages = mmap.mmap(-1, (-(-size // PAGE) + 2) * PAGE)
        self.pages.write(NO_NUMBER * len(self.pages))
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
        self.at = len(self.pages) - PAGE - -(-size // 16) * 16
        self.start = first + self.at
        for page in (first, first + len(self.pages) - PAGE):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
        if holds:
            ctypes.memmove(self.start, address, size)

    def give_back(self) -> None:
        around = self.pages[PAGE : self.at] + self.pages[self.at + self.size : -PAGE]
        assert not around.strip(NO_NUMBER), "written next to a tensor"
        ctypes.memmove(self.address, self.start, self.size)


class Emulator:
    """In place of NVRTC and the driver."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.order = folder, FORWARDS
        self.libraries: dict[str, ctypes.CDLL] = {}
        self.started: list[str] = []
        for name in ("hopper.h", "products.h"):
            (folder / name).write_text(f'#include "{HERE / "emulated_hopper.h"}"\n')
        for source in cuda_program._SOURCES.glob("*.cu"):
            shutil.copy(source, folder)
        self.compile("-c", str(HERE / "emulated_hopper.cpp"), "-o", "machine.o")

    def compile(self, *options: str) -> None:
        subprocess.run(["g++", *OPTIONS, *options], check=True, cwd=self.folder)

    def library(self, kernel: str, constants: Mapping[str, int]) -> ctypes.CDLL:
        macros = [f"-D{name}={value}" for name, value in sorted(constants.items())]
        name = kernel + "".join(macros)
        if name not in self.libraries:
            (self.folder / f"{kernel}.cpp").write_text(f'#include "{kernel}.cu"\nEMULATED({kernel})\n')
            self.compile("-shared", *macros, f"{kernel}.cpp", "machine.o", "-o", f"{name}.so")
            self.libraries[name] = ctypes.CDLL(str(self.folder / f"{name}.so"))
            self.libraries[name].start.restype = ctypes.c_char_p
        return self.libraries[name]

    def load(
        self, file: str, kernel: str, constants: Mapping[str, int], device: None, shared: int
    ) -> Callable[..., None]:
        library = self.library(kernel, constants)

        def start(
            grid: tuple[int, int, int],
            threads: int,
            arguments: tuple[int, ...],
            early: bool,
            structure: int = 0,
        ) -> None:
            assert early  # the emulator has a launch ahead
            x = Map.from_address(structure) if structure else None
            tensors = tensors_of(kernel, constants, grid[0], arguments, x)
            launch = Launch(grid[0], threads, shared, self.order)
            for name in ("inputs", "weight"):
                if name in tensors:
                    setattr(launch, name, Range(tensors[name].start, tensors[name].size))
            written = [tensors[name] for name in ("out", "partial", "counters") if name in tensors]
            for i, tensor in enumerate(written):
                launch.written[i] = Range(tensor.start, tensor.size)
            moved = {tensor.address: tensor.start for tensor in tensors.values()}
            values: list[ctypes.Structure | ctypes.c_int64] = [
                ctypes.c_int64(moved.get(value, value)) for value in arguments
            ]
            if x:
                values.insert(0, Map(moved[x.start], x.rows, x.columns, x.box_rows))
            places = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            wrong = library.start(ctypes.byref(launch), places)
            assert wrong is None, wrong.decode()
            for tensor in written:
                tensor.give_back()
            self.started.append(kernel)

        return start


def tensors_of(
    kernel: str, constants: Mapping[str, int], programs: int, arguments: tuple[int, ...], x: Map | None
) -> dict[str, Buffer]:
    """A launch's tensors; what is only written holds no numbers."""
    each = block_bytes(constants["PARTS"])
    if kernel == "dequantize":
        weight, out, count, _ = arguments
        return {"weight": Buffer(weight, count * each), "out": Buffer(out, count * 16 * 128 * 2, holds=False)}
    rows, out_features, in_features = arguments[-3:]
    found = {"weight": Buffer(arguments[0], out_features // 16 * (in_features // 128) * each)}
    if x is None:
        inputs, out = arguments[1:3]
    else:
        inputs, (out, partial, counters) = x.start, arguments[1:4]
        sums = 2 * programs * 64 * constants["GROUPS"] * constants["ROWS"]
        found["partial"] = Buffer(partial, 4 * sums, holds=False)
        found["counters"] = Buffer(counters, 4 * hopper_launch.most_tiles(out_features))
    found["inputs"] = Buffer(inputs, 2 * rows * in_features)
    found["out"] = Buffer(out, 2 * rows * out_features, holds=False)
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """An emulator that keeps what it compiles."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("needs Linux and g++")
    return Emulator(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulator(compiled: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """A GPU that takes tensors of the CPU."""
    compiled.order = FORWARDS
    compiled.started.clear()
    monkeypatch.setattr(cuda_program, "load", compiled.load)
    monkeypatch.setattr(
        cuda_program,
        "rows_map",
        lambda start, rows, columns, _, box_rows: Map(start, rows, columns, box_rows),
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(hopper, "_started", {})
    hopper._starter.cache_clear()
    yield compiled
    hopper._starter.cache_clear()


class Case(NamedTuple):
    """A product, and of how many processors: few, so that they share tiles."""

    rows: int
    out: int
    columns: int
    group: int
    dtype: torch.dtype
    processors: int


def check(case: Case, kernel: str, emulator: Emulator, patch: pytest.MonkeyPatch) -> None:
    """A product is right and whole; its bits depend on no order of programs and threads."""
    patch.setattr(hopper, "_processors", lambda device: case.processors)
    weight = random_weight(case.out, case.columns, case.group, case.rows, case.dtype)
    state = Hopper().prepare(weight, case.dtype)
    generator = torch.Generator().manual_seed(case.rows)
    inputs = torch.randn(case.rows, case.columns, generator=generator).to(case.dtype)
    products = []
    for emulator.order in (FORWARDS, BACKWARDS, SHUFFLED):
        products.append(Hopper().forward(inputs, state))
        assert not state.counters.any()
    assert emulator.started == 3 * [kernel]
    assert torch.isfinite(products[0]).all()
    expected = inputs.double() @ weight.dequantize().double().t()
    error = float((products[0] - expected).norm() / expected.norm())
    assert error < (6e-4 if case.dtype == FP16 else 4e-3)
    assert torch.equal(products[0], products[1])
    assert torch.equal(products[0], products[2])


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 208, 1152, 128, BF16, 3),
        Case(1, 16, 2432, 64, FP16, 3),
        Case(2, 208, 128, 32, FP16, 5),
        Case(3, 1040, 2432, 64, BF16, 7),
        Case(5, 208, 1152, 1152, FP16, 3),
        Case(8, 208, 2304, 32, BF16, 2),
        Case(8, 1040, 256, 256, BF16, 5),
    ],
)
def test_few_rows(case: Case, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, "few_rows", emulator, monkeypatch)


@pytest.mark.parametrize(
    "case",
    [
        Case(5, 80, 12288, 128, BF16, 5),
        Case(9, 208, 1152, 128, BF16, 7),
        Case(16, 1040, 384, 32, FP16, 20),
        Case(33, 1040, 1152, 64, BF16, 4),
        Case(64, 208, 128, 128, FP16, 5),
        Case(65, 336, 1152, 32, FP16, 2),
        Case(128, 208, 384, 64, BF16, 3),
        Case(130, 1040, 1152, 1152, BF16, 7),
    ],
)
def test_many_rows(case: Case, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, "many_rows", emulator, monkeypatch)


@pytest.mark.parametrize("rows", [16, 32])
def test_many_rows_of_a_large_layer(rows: int, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_launch, "_LARGE", 0)
    monkeypatch.setattr(hopper, "launch_for", hopper_launch.launch_for.__wrapped__)  # which remembers nothing
    check(Case(rows, 528, 1152, 128, FP16, 7), "many_rows", emulator, monkeypatch)


@pytest.mark.parametrize(("group", "dtype"), [(128, BF16), (64, FP16), (32, BF16), (256, FP16)])
def test_the_weight_as_floats(group: int, dtype: torch.dtype, emulator: Emulator) -> None:
    weight = random_weight(80, 768, group)
    state = Hopper().prepare(weight, dtype)
    for emulator.order in (FORWARDS, BACKWARDS):
        assert torch.equal(Hopper().dequantize(state, dtype), weight.dequantize(dtype))

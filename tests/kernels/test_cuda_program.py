"""CUDA C++ programs: compiled where NVRTC is installed, kept, and started by a driver that is stood in for.

No test needs a GPU but the last. The driver, and NVRTC where it is not the matter, are plain Python here.
"""

from __future__ import annotations

import ctypes
import enum
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from awq.errors import KernelError
from awq.kernels import cuda_program
from awq.kernels.cuda_program import Compiled, compile_cubin, compile_program, cubin, load, missing

TINY = """
#include "tiny.h"
extern "C" __global__ void tiny(const float* inputs, float* out, long long count, long long shift) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (i < count) out[i] = scaled(inputs[i]) + shift;
}
"""
HEADER = "__device__ float scaled(float x) { return FACTOR * x; }\n"
OK = (0,)
CONTEXT = "the primary context of GPU 1"


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_FOUND = 500


class Driver:
    """The driver, which writes down what it is asked for."""

    CUresult = Status
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="most shared")
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="early")
    CUlaunchConfig = SimpleNamespace

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.launched: list[dict[str, Any]] = []
        self.refusals: list[Status] = []
        self.meeting = threading.Barrier(1)

    def CUlaunchAttribute(self) -> Any:  # noqa: N802
        return SimpleNamespace(value=SimpleNamespace())

    def cuLaunchKernelEx(self, config: Any, function: str, parameters: int, extra: int) -> tuple[int]:  # noqa: N802
        self.meeting.wait()
        pointers = (ctypes.c_void_p * 4).from_address(parameters)
        values = [ctypes.c_int64.from_address(pointer or 0).value for pointer in pointers]
        status = self.refusals.pop(0) if self.refusals else Status.CUDA_SUCCESS
        self.launched.append({**vars(config), "function": function, "values": values})
        return (status,)

    def __getattr__(self, name: str) -> Any:
        answers = {
            "cuDeviceGet": ("GPU 1",),
            "cuDevicePrimaryCtxRetain": (CONTEXT,),
            "cuModuleLoadData": ("module",),
            "cuModuleGetFunction": ("function",),
        }

        def ask(*arguments: Any) -> tuple[Any, ...]:
            self.asked.append((name, *arguments))
            if "unknown" in str(arguments):
                return (Status.CUDA_ERROR_NOT_FOUND, None)
            return (Status.CUDA_SUCCESS, *answers.get(name, ()))

        return ask


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No memory of what is missing, or has been loaded."""
    missing.cache_clear()
    cuda_program._load.cache_clear()
    yield
    missing.cache_clear()
    cuda_program._load.cache_clear()


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources; and an empty cache."""
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "tiny.cu").write_text(TINY)
    (folder / "tiny.h").write_text(HEADER)
    monkeypatch.setattr(cuda_program, "_SOURCES", folder)
    monkeypatch.setenv("AWQ_KERNEL_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An NVRTC that knows its version, and which GPUs there are."""
    module = SimpleNamespace(
        nvrtcVersion=lambda: (*OK, 13, 0), nvrtcGetSupportedArchs=lambda: (*OK, [75, 80, 90, 100])
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", SimpleNamespace())
    return module


@pytest.fixture
def compiled(no_nvrtc: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What has been compiled, by a compiler that is quick."""
    done: list[tuple[Any, ...]] = []

    def quick(file: str, constants: dict[str, int], capability: int) -> Compiled:
        done.append((file, constants, capability))
        return Compiled(b"cubin %d" % len(done), "")

    monkeypatch.setattr(cuda_program, "compile_program", quick)
    return done


@pytest.fixture
def driver(compiled: object, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver with two GPUs, of which the second is a Hopper."""
    fake = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index else (12, 0))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7000 + index, raising=False)
    return fake


@pytest.fixture
def a_gpu(no_nvrtc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache").iterdir())


def test_nothing_is_missing_where_all_is_there(a_gpu: None) -> None:
    assert missing() is None


@pytest.mark.parametrize(("version", "available"), [("13.0", False), (None, True)])
def test_no_gpu_and_a_gpu_of_amds_are_told(
    version: str | None, available: bool, a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert missing() == "PyTorch finds no NVIDIA GPU here"


def test_the_oldest_of_several_gpus_decides(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6) if index else (9, 0))
    assert missing() == "it needs compute capability 9.0 or newer, not 8.6"


@pytest.mark.parametrize("module", ["driver", "nvrtc"])
def test_a_missing_package_is_told_with_the_command_for_this_cuda(
    module: str, a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"cuda.bindings.{module}", None)
    assert missing() == "cuda-bindings is not installed (pip install 'cuda-bindings==13.*')"


@pytest.mark.parametrize(
    ("version", "package"), [("12.8", "nvidia-cuda-nvrtc-cu12"), ("13.0", "nvidia-cuda-nvrtc")]
)
def test_a_missing_compiler_is_told_with_the_command_for_this_cuda(
    version: str, package: str, a_gpu: None, no_nvrtc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_library() -> None:
        raise RuntimeError("Failed to dlopen libnvrtc.so.13\nmore of it")

    no_nvrtc.nvrtcVersion = no_library
    monkeypatch.setattr(torch.version, "cuda", version)
    assert missing() == f"NVRTC does not start: Failed to dlopen libnvrtc.so.13 (pip install {package})"


def test_a_compiler_that_fails_is_told_with_its_error(a_gpu: None, no_nvrtc: Any) -> None:
    no_nvrtc.nvrtcGetSupportedArchs = lambda: (Status.CUDA_ERROR_INVALID_VALUE, None)
    assert "NVRTC does not start: CUDA_ERROR_INVALID_VALUE" in (missing() or "")


def test_a_compiler_older_than_the_gpu_is_told(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 + 3 * index, 0))
    assert missing() == "NVRTC 13.0 does not know capability 12.0 (install a newer PyTorch)"


def test_importing_loads_nothing_of_cuda() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import awq.kernels.cuda_program; "
        "print([name for name in set(sys.modules) - before if name.partition('.')[0] == 'cuda'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("capability", "arch"), [(90, "sm_90a"), (100, "sm_100a"), (120, "sm_120")])
def test_a_program_is_compiled_for_the_gpu_that_is_asked_for(capability: int, arch: str, nvrtc: Any) -> None:
    if capability not in nvrtc.nvrtcGetSupportedArchs()[1]:
        pytest.skip(f"this NVRTC does not know {arch}")
    image, log = compile_program("tiny.cu", {"FACTOR": 3}, capability)
    assert image[:4] == b"\x7fELF"
    assert int.from_bytes(image[18:20], "little") == 190  # ELF's number for CUDA
    assert f"Compiling entry function 'tiny' for '{arch}'" in log
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    assert compile_cubin("tiny.cu", {"FACTOR": 3}, capability) == image


def test_constants_reach_the_program(sources: Path, nvrtc: Any) -> None:
    (sources / "tiny.cu").write_text(f'{TINY}\nstatic_assert(FACTOR == 3 && WHOLE == 1, "constants");')
    compile_cubin("tiny.cu", {"FACTOR": 3, "WHOLE": True}, 90)
    with pytest.raises(KernelError, match=r"static assertion failed .*constants"):
        compile_cubin("tiny.cu", {"FACTOR": 4, "WHOLE": True}, 90)


def test_what_cannot_be_compiled_is_told_with_the_first_errors(sources: Path, nvrtc: Any) -> None:
    faults = "\n".join(f"__device__ int f{number}() {{ return fault{number}; }}" for number in range(9))
    (sources / "tiny.cu").write_text(faults)
    with pytest.raises(KernelError) as caught:
        compile_cubin("tiny.cu", {}, 90)
    message = str(caught.value)
    assert message.startswith("NVRTC cannot compile tiny.cu for sm_90a: tiny.cu(1): error: identifier")
    assert '"fault3" is undefined' in message
    assert "fault4" not in message


def test_a_gpu_that_nvrtc_does_not_know_is_told(nvrtc: Any) -> None:
    with pytest.raises(KernelError, match=r"for sm_999: nvrtc: error: invalid value for .*arch"):
        compile_cubin("tiny.cu", {"FACTOR": 3}, 999)


def test_a_real_cubin_is_kept(tmp_path: Path, nvrtc: Any) -> None:
    image = cubin("tiny.cu", {"FACTOR": 3}, 90)
    assert image == compile_cubin("tiny.cu", {"FACTOR": 3}, 90)
    (file,) = kept(tmp_path)
    assert file.name.startswith("tiny-sm_90a-")
    assert file.read_bytes().startswith(image)


def test_what_is_kept_is_not_compiled_again(tmp_path: Path, compiled: list[Any]) -> None:
    assert cubin("tiny.cu", {"FACTOR": 3, "WHOLE": 1}, 90) == b"cubin 1"
    assert cubin("tiny.cu", {"WHOLE": 1, "FACTOR": 3}, 90) == b"cubin 1"
    assert compiled == [("tiny.cu", {"FACTOR": 3, "WHOLE": 1}, 90)]
    assert len(kept(tmp_path)) == 1


def test_whatever_changes_a_program_misses_the_cache(
    sources: Path, no_nvrtc: Any, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cubin("tiny.cu", {"FACTOR": 3}, 90) == b"cubin 1"
    assert cubin("tiny.cu", {"FACTOR": 4}, 90) == b"cubin 2"
    assert cubin("tiny.cu", {"FACTOR": 3}, 100) == b"cubin 3"
    (sources / "tiny.h").write_text(HEADER + " ")
    assert cubin("tiny.cu", {"FACTOR": 3}, 90) == b"cubin 4"
    (sources / "tiny.cu").write_text(TINY + " ")
    assert cubin("tiny.cu", {"FACTOR": 3}, 90) == b"cubin 5"
    no_nvrtc.nvrtcVersion = lambda: (*OK, 13, 1)
    assert cubin("tiny.cu", {"FACTOR": 3}, 90) == b"cubin 6"
    monkeypatch.setattr(cuda_program, "_OPTIONS", ())
    assert cubin("tiny.cu", {"FACTOR": 3}, 90) == b"cubin 7"


@pytest.mark.parametrize("content", [b"", b"cubin", b"not a cubin, and longer than a checksum is"])
def test_a_damaged_cubin_is_compiled_anew(content: bytes, tmp_path: Path, compiled: list[Any]) -> None:
    cubin("tiny.cu", {}, 90)
    (file,) = kept(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(content)
    assert cubin("tiny.cu", {}, 90) == b"cubin 2"
    assert len(file.read_bytes()) == len(whole)
    assert cubin("tiny.cu", {}, 90) == b"cubin 2"


def test_a_cubin_of_another_user_is_not_taken(
    tmp_path: Path, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cubin("tiny.cu", {}, 90)
    (file,) = kept(tmp_path)
    assert cuda_program._kept(file) == b"cubin 1"
    stat = os.stat_result((*file.stat()[:4], 12345, *file.stat()[5:]))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: stat)
    assert cuda_program._kept(file) is None


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AWQ_KERNEL_CACHE", str(tmp_path / "file" / "cache"))
    assert [cubin("tiny.cu", {}, 90) for _ in range(2)] == [b"cubin 1", b"cubin 2"]


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    assert cubin("tiny.cu", {}, 90) == b"cubin 1"
    assert kept(tmp_path) == []


def test_a_kernel_is_loaded_once_into_the_context_that_pytorch_works_in(
    driver: Driver, compiled: list[Any]
) -> None:
    launcher = load("tiny.cu", "tiny", {"A": 1, "B": 2}, 1, 100_000)
    assert driver.asked == [
        ("cuInit", 0),
        ("cuDeviceGet", 1),
        ("cuDevicePrimaryCtxRetain", "GPU 1"),
        ("cuCtxPushCurrent", CONTEXT),
        ("cuModuleLoadData", b"cubin 1"),
        ("cuModuleGetFunction", "module", b"tiny"),
        ("cuFuncSetAttribute", "function", "most shared", 100_000),
        ("cuCtxPopCurrent",),
    ]
    assert compiled == [("tiny.cu", {"A": 1, "B": 2}, 90)]
    assert load("tiny.cu", "tiny", {"B": 2, "A": 1}, 1, 100_000) is launcher
    assert load("tiny.cu", "tiny", {"A": 1, "B": 3}, 1, 100_000) is not launcher


def test_a_kernel_that_does_not_exist_is_told_and_the_context_left_as_it_was(driver: Driver) -> None:
    reason = "kernel unknown of tiny.cu cannot be loaded on GPU 1 with 64 bytes .*: CUDA_ERROR_NOT_FOUND"
    with pytest.raises(KernelError, match=reason):
        load("tiny.cu", "unknown", {}, 1, 64)
    assert driver.asked[-1] == ("cuCtxPopCurrent",)


def test_a_kernel_is_started_with_what_it_is_given(driver: Driver) -> None:
    launcher = load("tiny.cu", "tiny", {}, 1, 4096)
    addresses = [2**64 - 4096, 2**47 + 16]  # as unsigned and as signed numbers
    launcher((7, 8, 9), 256, [*addresses, -1, 2**40], True)
    launcher((1, 2, 3), 128, (*addresses, 5, 6), False)
    first, second = driver.launched
    assert first["values"] == [-4096, 2**47 + 16, -1, 2**40]
    assert second["values"] == [-4096, 2**47 + 16, 5, 6]
    for launch, grid, threads in ((first, (7, 8, 9), 256), (second, (1, 2, 3), 128)):
        assert (launch["gridDimX"], launch["gridDimY"], launch["gridDimZ"]) == grid
        assert (launch["blockDimX"], launch["blockDimY"], launch["blockDimZ"]) == (threads, 1, 1)
        assert (launch["function"], launch["sharedMemBytes"], launch["hStream"]) == ("function", 4096, 7001)
        (attribute,) = launch["attrs"]
        assert attribute.id == "early"
        assert attribute.value.programmaticStreamSerializationAllowed == 1
    assert (first["numAttrs"], second["numAttrs"]) == (1, 0)


def test_a_structure_is_the_first_parameter_by_value(driver: Driver) -> None:
    launcher = load("tiny.cu", "tiny", {}, 1, 0)
    structures = [(ctypes.c_int64 * 16)(*range(first, first + 16)) for first in (100, 200)]
    for number, structure in enumerate(structures):
        launcher((1, 1, 1), 32, [7, 8, number], False, ctypes.addressof(structure))
    assert [launch["values"] for launch in driver.launched] == [[100, 7, 8, 0], [200, 7, 8, 1]]


def test_threads_that_start_a_kernel_together_do_not_mix_their_arguments(driver: Driver) -> None:
    launcher = load("tiny.cu", "tiny", {}, 1, 0)
    driver.meeting = threading.Barrier(2, timeout=30)
    threads = [
        threading.Thread(target=launcher, args=((number, 1, 1), 32, [number] * 4, False)) for number in (3, 4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = sorted((launch["gridDimX"], launch["values"]) for launch in driver.launched)
    assert seen == [(3, [3] * 4), (4, [4] * 4)]


def test_another_number_of_arguments_than_before_is_an_error(driver: Driver) -> None:
    launcher = load("tiny.cu", "tiny", {}, 1, 0)
    launcher((1, 1, 1), 32, [1, 2, 3, 4], False)
    for arguments in ([1, 2, 3], [1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="same size"):
            launcher((1, 1, 1), 32, arguments, False)
    assert len(driver.launched) == 1


def test_a_thread_that_has_not_used_cuda_gets_the_context(driver: Driver) -> None:
    launcher = load("tiny.cu", "tiny", {}, 1, 0)
    driver.refusals = [Status.CUDA_ERROR_INVALID_CONTEXT]
    launcher((1, 1, 1), 32, [1, 2, 3, 4], False)
    assert driver.asked[-1] == ("cuCtxSetCurrent", CONTEXT)
    assert [launch["values"] for launch in driver.launched] == [[1, 2, 3, 4]] * 2


@pytest.mark.parametrize("status", [Status.CUDA_ERROR_INVALID_VALUE, Status.CUDA_ERROR_INVALID_CONTEXT])
def test_a_start_that_the_driver_refuses_is_told_with_its_error(status: Status, driver: Driver) -> None:
    launcher = load("tiny.cu", "tiny", {}, 1, 0)
    driver.refusals = [status, status]
    reason = (
        rf"kernel tiny of tiny.cu cannot be started with a grid of \(1, 2, 3\) and 32 .* GPU 1: {status.name}"
    )
    with pytest.raises(KernelError, match=reason):
        launcher((1, 2, 3), 32, [1, 2, 3, 4], False)


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
def test_a_real_kernel_runs_on_the_current_stream_in_any_thread_and_in_a_graph(early: bool) -> None:
    if reason := missing():
        pytest.skip(reason)
    launcher = load("tiny.cu", "tiny", {"FACTOR": 3}, torch.cuda.current_device(), 100_000)
    inputs = torch.arange(1000, dtype=torch.float32, device="cuda")
    out = torch.empty_like(inputs)

    def start(shift: int) -> None:
        launcher((4, 1, 1), 256, [inputs.data_ptr(), out.data_ptr(), 1000, shift], early)

    start(-5)
    assert torch.equal(out, 3 * inputs - 5)
    thread = threading.Thread(target=start, args=(2**20,))
    thread.start()
    thread.join()
    assert torch.equal(out, 3 * inputs + 2**20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs.add_(1)
        start(7)
    graph.replay()
    assert torch.equal(out, 3 * torch.arange(1, 1001, device="cuda") + 7)

"""CUDA C++ programs: compiled when first needed, kept in the user's cache, started through the driver.

NVRTC compiles them: the machine needs no compiler and no headers, and a program is compiled for the very GPU
and shape that it is for. NVRTC and `cuda-bindings` come with PyTorch for CUDA. What it costs is some seconds
at the first start, and that CUDA's own headers (`cuda_bf16.h`, `cstdint`) cannot be included.

The sources are in the folder `cuda`. A kernel is declared `extern "C" __global__`, and each of its parameters
has 64 bits: a pointer or a `long long`; but for the first, which may be a structure. Constants come to it as
macros.

A start takes about two microseconds of Python: a decoder starts hundreds of kernels for every token.

Environment: `AWQ_KERNEL_CACHE` names the folder of the cache (`~/.cache/openawq/kernels` otherwise).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from awq.errors import KernelError, first_line
from awq.kernels.native import cache_folder

_SOURCES = Path(__file__).parent / "cuda"
_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
_OLDEST_CAPABILITY = 90
# Those whose matrix units have instructions that no other GPU has.
_SPECIFIC = (90, 100)
# Lines of NVRTC's that a message repeats.
_MOST_LINES = 4
_DIGEST_BYTES = 32


class Compiled(NamedTuple):
    """A program for one kind of GPU, and what the compiler said: registers, and bytes that were spilled."""

    cubin: bytes
    log: str


@functools.cache
def missing() -> str | None:
    """What this machine lacks for CUDA C++ programs, as a part of a sentence; None when nothing."""
    cuda = torch.version.cuda
    if cuda is None or not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU here"
    capabilities = [_capability(index) for index in range(torch.cuda.device_count())]
    if min(capabilities) < _OLDEST_CAPABILITY:
        return f"it needs compute capability 9.0 or newer, not {min(capabilities) / 10}"
    major = int(cuda.partition(".")[0])
    try:
        nvrtc, _ = _bindings("nvrtc"), _bindings("driver")
    except ImportError:
        return f"cuda-bindings is not installed (pip install 'cuda-bindings=={major}.*')"
    try:
        version = ".".join(map(str, _answer(nvrtc.nvrtcVersion())))
        known = _answer(nvrtc.nvrtcGetSupportedArchs())[0]
    except (RuntimeError, KernelError) as error:  # RuntimeError where there is no library
        package = "nvidia-cuda-nvrtc" if major >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
        return f"NVRTC does not start: {first_line(error)} (pip install {package})"
    unknown = set(capabilities) - set(known)
    if unknown:
        return f"NVRTC {version} does not know capability {min(unknown) / 10} (install a newer PyTorch)"
    return None


def compile_cubin(file: str, constants: Mapping[str, int], capability: int) -> bytes:
    """The cubin of `cuda/<file>`: `compile_program` without the log."""
    return compile_program(file, constants, capability).cubin


def compile_program(file: str, constants: Mapping[str, int], capability: int) -> Compiled:
    """Compile `cuda/<file>`, whatever the cache has. Needs no GPU.

    Args:
        file: the source; it may include headers that lie beside it.
        constants: macros.
        capability: of the GPU, as 90 for 9.0.

    Raises:
        KernelError: NVRTC cannot compile it; the message repeats what NVRTC said.
    """
    nvrtc = _bindings("nvrtc")
    options = [*_options(constants, capability), f"--include-path={_SOURCES}"]
    source = (_SOURCES / file).read_bytes()
    (program,) = _answer(nvrtc.nvrtcCreateProgram(source, file.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        text = bytearray(_answer(nvrtc.nvrtcGetProgramLogSize(program))[0])
        _answer(nvrtc.nvrtcGetProgramLog(program, text))
        log = text.rstrip(b"\0").decode(errors="replace")
        if status:
            raise KernelError(f"NVRTC cannot compile {file} for {_arch(capability)}: {_errors(log, status)}")
        image = bytearray(_answer(nvrtc.nvrtcGetCUBINSize(program))[0])
        _answer(nvrtc.nvrtcGetCUBIN(program, image))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(bytes(image), log)


def cubin(file: str, constants: Mapping[str, int], capability: int) -> bytes:
    """The cubin of `cuda/<file>`: from the cache, or compiled now and kept there. Needs no GPU.

    Arguments and errors are those of `compile_program`. A cache that cannot be written is done without.
    """
    name = f"{Path(file).stem}-{_arch(capability)}-{_key(file, constants, capability)}.cubin"
    kept = cache_folder() / name
    found = _kept(kept)
    if found is None:
        found = compile_cubin(file, constants, capability)
        with suppress(OSError):
            _keep(kept, found)
    return found


def load(
    file: str, kernel_name: str, constants: Mapping[str, int], device_index: int, shared_bytes: int
) -> Launcher:
    """A kernel of `cuda/<file>` in the memory of a GPU; the same one for the same arguments.

    Args:
        file: the source.
        kernel_name: one of its `extern "C" __global__` functions.
        constants: macros.
        device_index: PyTorch's index of the GPU.
        shared_bytes: dynamic shared memory of each block of threads.

    Raises:
        KernelError: it cannot be compiled or loaded.
    """
    return _load(file, kernel_name, tuple(sorted(constants.items())), device_index, shared_bytes)


class Launcher:
    """A kernel in the memory of one GPU, to be called to start it. Made by `load`."""

    def __init__(self, name: str, function: Any, context: Any, device_index: int, shared_bytes: int) -> None:
        self.name = name
        self.device_index = device_index
        self._function, self._context = function, context
        self._launch = _bindings("driver").cuLaunchKernelEx
        self._stream = torch._C._cuda_getCurrentRawStream
        self._frame = _Frame(shared_bytes)

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[int],
        early: bool,
        structure: int = 0,
    ) -> None:
        """Start the kernel on PyTorch's current stream of the GPU, which must be the current device.

        Args:
            grid: blocks of threads in each direction.
            threads: in each block.
            arguments: for each parameter an address or a number. Always as many as at the first call: the
                driver reads as many as the kernel declares.
            structure: the address of one that the kernel takes by value as its first parameter; 0 for none.
            early: let it start while the kernel before it still runs (programmatic dependent launch). It has
                to wait for that one itself (`griddepcontrol.wait`) before it touches memory that both use.

        Raises:
            KernelError: the driver refuses. An error of the kernel itself appears later, as with any kernel.
            ValueError: not as many arguments as before.
        """
        frame = self._frame
        if frame.pointers is None:
            frame.make_room(len(arguments), structure != 0)
        frame.values[:] = arguments
        if structure:
            frame.pointers[0] = structure
        config = frame.config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX = threads
        config.numAttrs = early
        config.hStream = self._stream(self.device_index)
        (status,) = self._launch(config, self._function, frame.pointers_at, 0)
        if status and status.name == "CUDA_ERROR_INVALID_CONTEXT":  # this thread has not used CUDA yet
            _answer(_bindings("driver").cuCtxSetCurrent(self._context))
            (status,) = self._launch(config, self._function, frame.pointers_at, 0)
        if status:
            where = f"with a grid of {grid} and {threads} threads on GPU {self.device_index}"
            raise KernelError(f"{self.name} cannot be started {where}: {status.name}")


@functools.lru_cache(maxsize=4096)
def rows_map(address: int, rows: int, columns: int, bfloat16: bool, box_rows: int) -> Any:
    """How the copy engine finds rows of 16-bit floats: an object whose `getPtr()` is a kernel's `structure`.

    A box is `box_rows` rows of 64 columns, each 128 bytes in shared memory, whose pieces of 16 bytes are
    permuted: piece i of row r lies at i ^ (r % 8). Rows behind the last are zeros.

    Args:
        address: of the first row; divides by 16.
        rows: how many there are.
        columns: of each; as many bytes as lie between the starts of two rows, halved.

    Raises:
        KernelError: the driver refuses.
    """
    driver = _bindings("driver")
    kinds = driver.CUtensorMapDataType
    (found,) = _answer(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if bfloat16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            2,
            address,
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(2 * columns)],
            [driver.cuuint32_t(64), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return found


class _Frame(threading.local):
    """What a start hands to the driver; each thread has its own. The driver has copied it when it returns."""

    def __init__(self, shared_bytes: int) -> None:
        driver = _bindings("driver")
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        self.config = driver.CUlaunchConfig()
        self.config.blockDimY = self.config.blockDimZ = 1
        self.config.sharedMemBytes = shared_bytes
        self.config.attrs = [early]  # in force where `numAttrs` is 1
        self.values: Any = None
        self.pointers: Any = None
        self.pointers_at = 0

    def make_room(self, count: int, behind: bool) -> None:
        """For this many arguments, `behind` the place of a structure or not."""
        self.values = (ctypes.c_int64 * count)()
        first = ctypes.addressof(self.values)
        places = [0] * behind + list(range(first, first + 8 * count, 8))
        self.pointers = (ctypes.c_void_p * len(places))(*places)
        self.pointers_at = ctypes.addressof(self.pointers)


@functools.cache
def _load(
    file: str, kernel_name: str, constants: tuple[tuple[str, int], ...], device_index: int, shared_bytes: int
) -> Launcher:
    image = cubin(file, dict(constants), _capability(device_index))
    driver = _bindings("driver")
    name = f"the kernel {kernel_name} of {file}"
    try:
        _answer(driver.cuInit(0))
        (device,) = _answer(driver.cuDeviceGet(device_index))
        (context,) = _answer(driver.cuDevicePrimaryCtxRetain(device))  # the one that PyTorch works in
        _answer(driver.cuCtxPushCurrent(context))
        try:
            (module,) = _answer(driver.cuModuleLoadData(image))
            (function,) = _answer(driver.cuModuleGetFunction(module, kernel_name.encode()))
            most_shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _answer(driver.cuFuncSetAttribute(function, most_shared, shared_bytes))
        finally:
            _answer(driver.cuCtxPopCurrent())
    except KernelError as error:
        where = f"on GPU {device_index} with {shared_bytes} bytes of shared memory"
        raise KernelError(f"{name} cannot be loaded {where}: {error}") from error
    return Launcher(name, function, context, device_index, shared_bytes)


def _bindings(name: str) -> Any:
    """A module of `cuda-bindings`, which importing this one must not need."""
    return importlib.import_module(f"cuda.bindings.{name}")


def _answer(returned: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function of NVIDIA's returned behind its status; KernelError with the name of an error."""
    status, *values = returned
    if status:
        raise KernelError(status.name)
    return tuple(values)


def _capability(device_index: int) -> int:
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def _arch(capability: int) -> str:
    return f"sm_{capability}a" if capability in _SPECIFIC else f"sm_{capability}"


def _options(constants: Mapping[str, int], capability: int) -> list[str]:
    macros = [f"-D{name}={int(value)}" for name, value in sorted(constants.items())]
    return [f"--gpu-architecture={_arch(capability)}", *_OPTIONS, *macros]


def _errors(log: str, status: Any) -> str:
    """The errors in a log, shortened."""
    lines = [line.strip() for line in log.splitlines() if "error" in line] or log.splitlines()
    return "; ".join(lines[:_MOST_LINES]) or status.name


def _key(file: str, constants: Mapping[str, int], capability: int) -> str:
    """Changes with whatever changes the cubin."""
    version = _answer(_bindings("nvrtc").nvrtcVersion())
    digest = hashlib.sha256(repr((file, _options(constants, capability), version)).encode())
    for source in sorted(_SOURCES.iterdir()):
        if source.is_file():
            digest.update(repr((source.name, source.read_bytes())).encode())
    return digest.hexdigest()[:16]


def _kept(file: Path) -> bytes | None:
    """The cubin in a file of the cache; None where there is none, or not a whole one of this user's."""
    try:
        owner, content = file.stat().st_uid, file.read_bytes()
    except OSError:
        return None
    found, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    ours = owner in (getattr(os, "getuid", int)(), 0)  # on Windows every owner is 0
    return found if ours and hashlib.sha256(found).digest() == digest else None


def _keep(file: Path, image: bytes) -> None:
    """Write a cubin and its checksum, under another name first: nobody ever sees half of it."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    number, made = tempfile.mkstemp(suffix=".part", prefix=f"{file.stem}-", dir=file.parent)
    try:
        with os.fdopen(number, "wb") as handle:
            handle.write(image + hashlib.sha256(image).digest())
        os.replace(made, file)
    finally:
        with suppress(OSError):
            os.unlink(made)

"""The C++ products: compiled when first needed, kept in the user's cache, called without a binding layer.

The library knows nothing of PyTorch but the thread pool that it is handed, so it compiles in seconds, needs
no headers, and stays valid when PyTorch or the compiler is updated. One library serves one instruction set;
the best that this processor has is taken, and the next one where the compiler is too old for it.

Environment: `CXX` names the compiler, `AWQ_KERNEL_CACHE` the folder (`~/.cache/openawq/kernels` otherwise),
`AWQ_CPU_ISA` an instruction set to take instead of the best; `none` does without.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

_SOURCES = Path(__file__).parent / "cpp"
_OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-exceptions", "-fno-math-errno", "-w")
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
# Best first: what the processor must have, as Linux calls it; for x86-64 compilers call most of it the same.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, "avx512_vnni", "amx_tile", "amx_int8"),
    "avx512-vnni": (*_AVX512, "avx512_vnni"),
    "avx512": _AVX512,
    "avx2-vnni": (*_AVX2, "avx_vnni"),
    "avx2": _AVX2,
    "neon-dot": ("asimd", "asimddp"),
    "neon": ("asimd",),
}
_ARM_OPTIONS = {"neon-dot": "-march=armv8.2-a+dotprod", "neon": "-march=armv8-a"}
_SYSTEMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
_CONDITIONS = (OSError, subprocess.SubprocessError)
# Seconds; a library takes about three on a quiet machine.
_PATIENCE = 300


@dataclasses.dataclass(frozen=True)
class Native:
    """The loaded library, and the instruction set it was built for."""

    library: Any
    instruction_set: str


@dataclasses.dataclass(frozen=True)
class _Check:
    """What a library is started with, and what it must pass."""

    pool: int
    is_right: Callable[[Native], bool]


@functools.cache
def load(is_right: Callable[[Native], bool]) -> Native | str:
    """The library, or why there is none, as a part of a sentence. Compiles where the cache has nothing.

    Only a library is returned of which `is_right` says that it multiplies as it should.

    What the user could change (no compiler, a compiler that fails) is also told in a warning, once.
    """
    asked = os.environ.get("AWQ_CPU_ISA", "")
    if asked == "none":
        return "AWQ_CPU_ISA=none is set"
    if (sys.platform, platform.machine()) not in _SYSTEMS:
        served = "Linux on x86-64 and ARM and for macOS on ARM"
        return f"it is written for {served}, not for {platform.system()} on {platform.machine()}"
    usable = available()
    if asked:
        usable = [name for name in usable if name == asked]
    if not usable:
        return f"AWQ_CPU_ISA={asked} is not what this processor has" if asked else "the processor lacks AVX2"
    pool = _thread_pool()
    if pool is None:
        return "PyTorch's thread pool was not found"
    reason = ""
    for name in usable:
        found = _open(name, _Check(pool, is_right))
        if isinstance(found, Native):
            return found
        reason = reason or found
    warnings.warn(
        f"OpenAWQ's C++ product for CPUs cannot be used: {reason}. A slower one takes its place; "
        "`awq doctor` says what is missing",
        stacklevel=2,
    )
    return reason


def available() -> list[str]:
    """Instruction sets that this processor has, best first."""
    if sys.platform == "darwin":  # each of Apple's own has both
        return list(_ARM_OPTIONS) if platform.machine() == "arm64" else []
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    words = ("flags", "Features")  # on x86-64 and on ARM
    flags = set(next((line for line in text.splitlines() if line.startswith(words)), "").split())
    return [name for name, needed in INSTRUCTION_SETS.items() if flags >= set(needed)]


def compiler() -> str | None:
    """The C++ compiler to use, as a path."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    return None


def cache_folder() -> Path:
    """Where libraries are kept."""
    if named := os.environ.get("AWQ_KERNEL_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openawq" / "kernels"


def _open(name: str, check: _Check) -> Native | str:
    """The library for an instruction set: from the cache, or compiled now."""
    file = cache_folder() / f"w4-{name}-{_key(name)}.so"
    if file.exists():
        loaded = _loaded(file, name, check)
        if isinstance(loaded, Native):
            return loaded
    try:
        return _made(file, name, check)
    except _CONDITIONS:
        pass
    # A home that cannot be written to: compile for this process alone.
    with tempfile.TemporaryDirectory(prefix="awq-kernels-") as folder:
        try:
            return _made(Path(folder) / file.name, name, check)
        except _CONDITIONS as error:
            return f"compiling it failed: {error}"


def _made(file: Path, name: str, check: _Check) -> Native | str:
    """Compile to `file` and load it; whoever else is at it is waited for."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(file.with_suffix(".lock")):
        if file.exists():
            loaded = _loaded(file, name, check)
            if isinstance(loaded, Native):
                return loaded
        reason = _compile(file, name)
    return reason or _loaded(file, name, check)


def _compile(file: Path, name: str) -> str | None:
    """Compile, under another name first: nobody ever sees half a library. Returns what went wrong."""
    path = compiler()
    if path is None:
        named = os.environ.get("CXX")
        return (
            f"CXX names {named}, which does not exist"
            if named
            else "no C++ compiler was found (c++, g++, clang++, or what CXX names)"
        )
    number, made = tempfile.mkstemp(suffix=".part", prefix=f"{file.stem}-", dir=file.parent)
    os.close(number)
    try:
        command = [path, *_OPTIONS, *_flags(name), str(_SOURCES / "w4.cpp"), "-o", made]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, errors="replace")
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
            return f"{path} cannot compile it for {name}: {lines[0] or done.returncode}"
        # Loading half a library would not be an error but the end of the process. The checksum is a file of
        # its own, because macOS ends processes that load what was changed after it was linked.
        with open(made, "rb") as handle:
            digest = hashlib.sha256(handle.read()).hexdigest()
            os.fsync(handle.fileno())
        _checksum(file).write_text(digest)
        os.replace(made, file)
    finally:
        with suppress(OSError):
            os.unlink(made)
    return None


def _loaded(file: Path, name: str, check: _Check) -> Native | str:
    """Load a library and see that it multiplies right."""
    if file.stat().st_uid not in (os.getuid(), 0):
        return f"{file} belongs to another user"
    try:
        if hashlib.sha256(file.read_bytes()).hexdigest() != _checksum(file).read_text():
            return f"{file} is damaged"
        library = ctypes.CDLL(str(file))
        _declare(library)
    except (OSError, AttributeError) as error:
        return f"{file} cannot be loaded: {error}"
    if library.openawq_start(check.pool):
        return f"the system does not allow {name}"
    native = Native(library, name)
    return native if check.is_right(native) else f"{file} gives wrong products"


def _declare(library: Any) -> None:
    pointer, number, whole = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.openawq_start.argtypes = [pointer]
    library.openawq_w4.argtypes = [
        *(pointer, whole, number, whole, whole, whole),
        *(pointer, pointer, number, pointer, whole, number, pointer, number, number),
    ]
    real = ctypes.c_float
    library.openawq_norm.argtypes = [
        *(pointer, number, whole, whole, pointer, number, real, real, number, pointer, number),
    ]
    library.openawq_norm.restype = None
    library.openawq_attend.argtypes = [
        *(pointer, pointer, pointer, number, pointer, pointer),
        *(whole, whole, whole, whole, whole, real, pointer, number),
    ]
    for name in ("openawq_block", "openawq_experts"):
        getattr(library, name).argtypes = [pointer, pointer, number]
    for name in ("openawq_pack", "openawq_unpack"):
        getattr(library, name).argtypes = [pointer, whole, whole, number, pointer, number]
        getattr(library, name).restype = None


def _checksum(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _flags(name: str) -> list[str]:
    if name in _ARM_OPTIONS:
        return [_ARM_OPTIONS[name]]
    return [f"-m{flag.replace('amx_', 'amx-').replace('_', '')}" for flag in INSTRUCTION_SETS[name]]


def _key(name: str) -> str:
    """Changes with whatever changes the library."""
    digest = hashlib.sha256("\0".join((*_OPTIONS, *_flags(name))).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _thread_pool() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP library that PyTorch has loaded, whichever it is."""
    found = [ctypes.CDLL(None)]
    for file in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.*")):  # .so, .so.1, .dylib
        with suppress(OSError):
            found.append(ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD))
    for library in found:
        if hasattr(library, "GOMP_parallel"):
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    return None


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keep other processes out, as far as the file system can; what they would do twice is harmless."""
    import fcntl

    with lock.open("w") as handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield

"""What a GPU keeps is decided by what is free on it; and what the C library does with freed memory."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from awq.pipeline.memory import has_room, large_pieces_apart

MB = 1 << 20


def test_a_gpu_keeps_a_quarter_of_what_is_free_and_a_cpu_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 80_000))
    assert has_room(torch.device("cuda"), 1000)
    assert not has_room(torch.device("cuda"), 1001)
    assert not has_room(torch.device("cpu"), 1)


class _Info(ctypes.Structure):
    # As in malloc.h: ten numbers, of which the fifth, `hblkhd`, is of bytes outside the heap.
    _fields_ = (("before", ctypes.c_size_t * 4), ("hblkhd", ctypes.c_size_t), ("after", ctypes.c_size_t * 5))


def apart() -> int:
    """Bytes that lie outside of glibc's heap."""
    library: Any = ctypes.CDLL(None)
    told = getattr(library, "mallinfo2", None)
    if told is None:
        pytest.skip("the C library is not glibc 2.33 or newer")
    told.restype = _Info
    return int(told().hblkhd)


def grows_by(size: int) -> int:
    before = apart()
    held = torch.empty(size, dtype=torch.uint8)
    grown = apart() - before
    del held
    return grown


def test_large_tensors_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    with large_pieces_apart():
        assert grows_by(9 * MB) >= 9 * MB
        assert grows_by(2 * MB) == 0
    assert grows_by(9 * MB) == 0
    assert grows_by(40 * MB) >= 40 * MB


def test_what_the_user_says_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    with large_pieces_apart():  # which leaves glibc's own limit behind
        pass
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(32 * MB))
    with large_pieces_apart():
        assert grows_by(9 * MB) == 0

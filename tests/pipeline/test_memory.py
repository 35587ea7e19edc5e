"""What a GPU keeps is decided by what is free on it; and what the C library does with freed memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from awq.pipeline.memory import has_room


def test_a_gpu_keeps_a_quarter_of_what_is_free_and_a_cpu_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 80_000))
    assert has_room(torch.device("cuda"), 1000)
    assert not has_room(torch.device("cuda"), 1001)
    assert not has_room(torch.device("cpu"), 1)


# A process of its own: in a heap that other tests have used, glibc may find room for a large tensor as it is.
_SCRIPT = """
import ctypes, os, sys
import torch
from awq.pipeline.memory import large_pieces_apart

MB = 1 << 20

class Info(ctypes.Structure):
    # As in malloc.h: ten numbers, of which the fifth, `hblkhd`, is of bytes outside the heap.
    _fields_ = (("before", ctypes.c_size_t * 4), ("hblkhd", ctypes.c_size_t), ("after", ctypes.c_size_t * 5))

told = getattr(ctypes.CDLL(None), "mallinfo2", None)
if told is None:
    sys.exit(77)
told.restype = Info

def grows_by(size):
    before = told().hblkhd
    held = torch.empty(size, dtype=torch.uint8)
    return told().hblkhd - before

"""


def run(lines: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_MMAP_THRESHOLD_"}
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT + lines], capture_output=True, text=True, env=environment
    )
    if ran.returncode == 77:
        pytest.skip("the C library is not glibc 2.33 or newer")
    assert ran.returncode == 0, ran.stderr


def test_large_tensors_have_memory_of_their_own() -> None:
    run("""
grows_by(30 * MB)  # once that is freed, glibc would keep all that is smaller in its heap
with large_pieces_apart():
    assert grows_by(9 * MB) >= 9 * MB
    assert grows_by(2 * MB) == 0
assert grows_by(9 * MB) == 0
assert grows_by(40 * MB) >= 40 * MB
""")


def test_what_the_user_says_stands() -> None:
    run("""
with large_pieces_apart():  # which leaves glibc's own limit behind
    pass
os.environ["MALLOC_MMAP_THRESHOLD_"] = str(32 * MB)
with large_pieces_apart():
    assert grows_by(9 * MB) == 0
""")

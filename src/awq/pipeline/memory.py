"""How much memory there is, how much was used, and how many tokens fit a batch."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from awq.model import Skeleton
from awq.model.experts import expert_names
from awq.model.layers import linears_of

# On the CPU larger batches gain nothing: the products are large enough, and activations cost memory.
_CPU_BATCH_TOKENS = 4096
# Steps on few tokens cost less, and more of them teach more than fewer steps on many.
_TUNING_BATCH_TOKENS = 1024
_MOST_BATCH_TOKENS = 65536
# glibc's malloc.h, and the size up to which it raises that limit by itself.
_MMAP_THRESHOLD, _GLIBC_MOST = -3, 32 << 20
_APART = 8 << 20


def batch_tokens_for(device: torch.device, blocks: Sequence[nn.Module], tuning: bool = False) -> int:
    """Tokens of a batch: a quarter of an accelerator's free memory, at float32 and two copies each.

    Tuning has a size of its own.
    """
    if tuning:
        return _TUNING_BATCH_TOKENS
    if device.type != "cuda":
        return _CPU_BATCH_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    per_token = max(channels_at_once(block) for block in blocks)
    return max(512, min(_MOST_BATCH_TOKENS, free // 4 // (8 * per_token)))


def has_room(device: torch.device, size: int) -> bool:
    """Whether a GPU can keep `size` bytes beside its work: a quarter of what is free is theirs at most."""
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 4


def channels_at_once(block: nn.Module) -> int:
    """Input and output channels of all linear layers that a token passes; experts run one after another."""
    within = expert_names(block)
    return sum(
        linear.in_features + linear.out_features
        for name, linear in linears_of(block).items()
        if name not in within or within[name].number == 0
    )


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of the accelerator's allocator, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def large_pieces_apart() -> Iterator[None]:
    """Let tensors of 8 MB and more have memory of their own, which goes back when they are freed (glibc).

    They would lie in the C library's heap, once it had seen a larger one freed, and leave gaps there between
    others that are in use: the heap would grow layer after layer. `MALLOC_MMAP_THRESHOLD_` in the environment
    is left as it is.
    """
    change = _of_the_library("mallopt")
    if change is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    change(_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        change(_MMAP_THRESHOLD, _GLIBC_MOST)


def give_back() -> None:
    """Hand freed memory back to the system, where the C library would keep it for later (glibc).

    Freed pieces of many sizes lie between others that are in use, and the heap would grow block after block.
    """
    trim = _of_the_library("malloc_trim")
    if trim is not None:
        trim(0)


def _of_the_library(name: str) -> Any:
    """A function of the C library, or None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def surrounding_bytes(skeleton: Skeleton, list_name: str, images: bool) -> int:
    """Bytes as float32 of what is loaded outside the blocks: the embeddings; for images all but the head."""
    embeddings: Any = skeleton.model.get_input_embeddings
    if not images:
        return 4 * sum(parameter.numel() for parameter in embeddings().parameters())
    model: Any = skeleton.model
    head = model.get_output_embeddings()
    inside = {id(parameter) for parameter in model.get_submodule(list_name).parameters()}
    inside |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    return 4 * sum(p.numel() for p in model.parameters() if id(p) not in inside)

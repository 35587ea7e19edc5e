"""How exactly floats are computed while a model is worked on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def float32_by_default() -> Iterator[None]:
    """New tensors are float32, whatever dtype the caller has made torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
@float32_by_default()
@contextmanager
def matmul_precision(name: Literal["highest", "high"]) -> Iterator[None]:
    """Float32 products in full (`highest`), or by an accelerator's faster units (`high`).

    Statistics and losses bear ten bits of mantissa in each factor: they sum over thousands of tokens, and
    candidates are compared under the same rounding. Proofs do not bear them, nor does refining, which
    descends along differences of nearly equal sums.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

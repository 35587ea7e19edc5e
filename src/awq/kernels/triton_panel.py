"""Rounding with error compensation, and refining, on a GPU: a panel of channels in one launch.

`search.rounding.round_panel` does the same in plain PyTorch with some eight launches for every channel, which
takes a GPU longer than all the rest of the search. Rows of a weight are independent of one another, so each
program rounds a few of them through all the channels of the panel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from awq.kernels.triton_int4 import missing

# Rows of the weight that a program rounds.
_BLOCK = 32
# Channels of the widest panel that a program holds.
_WIDEST = 128


def mover_for(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] | None:
    """What moves the codes of panels on a device; None where plain PyTorch has to."""
    return move_panel if device.type == "cuda" and missing() is None else None


def panel_for(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] | None:
    """What rounds panels on a device; None where plain PyTorch has to."""
    return round_panel if device.type == "cuda" and missing() is None else None


def round_panel(rest: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    """As `search.rounding.round_panel`, up to the order of roundings within one float32 operation.

    Args:
        rest, scales, zeros: float32 `[channels, out]`, contiguous; `rest` is replaced by the errors.
        upper: float32 `[channels, channels]`.
    """
    from awq.kernels import triton_programs

    assert all(part.is_contiguous() for part in (rest, scales, zeros))
    channels, out = rest.shape
    codes = torch.empty(channels, out, dtype=torch.uint8, device=rest.device)
    with torch.cuda.device_of(rest):  # Triton launches on the current device
        triton_programs.round_panel[(-(-out // _BLOCK),)](
            rest,
            upper.contiguous(),
            scales,
            zeros,
            codes,
            channels,
            out,
            levels,
            WIDEST=_WIDEST,
            BLOCK=_BLOCK,
            num_warps=1,
        )
    return codes


def move_panel(codes: Tensor, slope: Tensor, gram: Tensor, scales: Tensor, levels: int) -> Tensor:
    """As `search.refine.move_panel`, up to the order of roundings within one float32 operation.

    Args:
        codes, slope, scales: float32 `[channels, out]`, contiguous; `codes` are moved in place.
        gram: float32 `[channels, channels]`.
    """
    from awq.kernels import triton_programs

    assert all(part.is_contiguous() for part in (codes, slope, gram, scales))
    channels, out = codes.shape
    moves = torch.empty_like(slope)
    with torch.cuda.device_of(codes):
        triton_programs.move_panel[(-(-out // _BLOCK),)](
            codes,
            slope,
            gram,
            scales,
            moves,
            channels,
            out,
            levels,
            TINY=torch.finfo(torch.float32).tiny,
            WIDEST=_WIDEST,
            BLOCK=_BLOCK,
            num_warps=1,
        )
    return moves

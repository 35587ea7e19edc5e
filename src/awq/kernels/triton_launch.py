"""Starting the Triton programs for products: what is found out at the first start is kept for those after it.

A decoder starts some two hundred products for every token, and each is over sooner than the host has
prepared the next. Triton looks at all arguments anew at every start, to see whether it has to compile for
them; here one look at the measures of a product tells that it has run before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from awq.kernels.triton_table import Launch, plane_of, planes_per_group

if TYPE_CHECKING:
    from awq.kernels.triton_int4 import State


class _Started(NamedTuple):
    """A compiled program with its grid; what it is given behind the number of rows; floats of shared sums."""

    start: Callable[..., None]
    measures: tuple[Any, ...]
    cells: int | None


_started: dict[tuple[Any, ...], _Started] = {}


def multiply(
    inputs: Tensor, state: State, launch_of: Callable[[Tensor, State], tuple[Launch, bool]]
) -> Tensor:
    """inputs `[rows, in_features]`, contiguous and on the current device, times the weight.

    Args:
        launch_of: how a product that has not run before is to be launched, and whether its program may
            contain NVIDIA's assembly.
    """
    words, pairs, rows = state.words, state.pairs, inputs.shape[0]
    out = inputs.new_empty(rows, words.shape[0])
    key = (rows, words.shape, state.in_features, state.group_size, inputs.dtype, inputs.device)
    # Programs are compiled for addresses that divide by 16, as those of whole tensors do.
    aligned = (inputs.data_ptr() | words.data_ptr() | pairs.data_ptr()) % 16 == 0
    started = _started.get(key) if aligned else None
    if started is None:
        started = _first(inputs, state, out, *launch_of(inputs, state))
        if started is not None and aligned:
            _started[key] = started
    elif started.cells is None:
        started.start(inputs, words, pairs, out, rows, *started.measures)
    else:
        partial = torch.empty(started.cells, dtype=torch.float32, device=inputs.device)
        started.start(inputs, words, pairs, out, partial, state.counters, rows, *started.measures)
    return out


def _first(inputs: Tensor, state: State, out: Tensor, launch: Launch, ptx: bool) -> _Started | None:
    """Start a program for the first time; None under Triton's interpreter, which keeps nothing."""
    from awq.kernels import triton_programs

    rows, (out_features, row_words) = inputs.shape[0], state.words.shape
    plane = plane_of(state.group_size)
    constants: dict[str, Any] = {
        "GROUP": state.group_size,
        "PLANE": plane,
        "PER_GROUP": planes_per_group(state.group_size, plane),
        "WHOLE": state.in_features % (4 * plane) == 0,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BF16": inputs.dtype == torch.bfloat16,
        "PTX": ptx,
    }
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    measures: tuple[int, ...] = (out_features, state.in_features, row_words)
    across = -(-out_features // launch.block_n)
    tensors = [inputs, state.words, state.pairs, out]
    cells = None
    if launch.side:
        program, grid = triton_programs.few_rows, (across, 1, 1)
        early = launch.early and ptx
        constants |= {
            "WHOLE": state.in_features % (4 * plane * launch.side) == 0,
            "SIDE": launch.side,
            "STAGES": launch.stages,
            "ONE": rows == 1,
            "EARLY": early,
        }
        if early:
            options["launch_pdl"] = True
    else:
        down = -(-rows // launch.block_m)
        program, grid = triton_programs.many_rows, (down, across, launch.split)
        cells = launch.split * down * across * launch.block_m * launch.block_n if launch.split > 1 else 0
        tensors += [torch.empty(cells, dtype=torch.float32, device=inputs.device), state.counters]
        measures += (-(-(row_words // plane) // launch.split),)
        constants["SPLIT"] = launch.split
    compiled = program[grid](*tensors, rows, *measures, **constants, **options)
    if compiled is None:
        return None
    names = program.arg_names[len(tensors) + 1 + len(measures) :]
    return _Started(compiled[grid], (*measures, *(constants[name] for name in names)), cells)

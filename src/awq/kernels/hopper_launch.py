"""How products on Hopper GPUs are launched: by rows and shape, measured once on an H200, never searched.

Both programs share a weight out equally among the processors, whatever its shape. What is chosen is how many
rows one program computes, and how much of the shared memory is for what is read ahead.
"""

from __future__ import annotations

import dataclasses
import functools

from awq.kernels.hopper_layout import BLOCK, TILE, block_bytes

# From this many rows on, writing the weight out as floats for a dense product takes less time.
DENSE_ROWS = 513
# Bytes of shared memory that a program may have, and with which two of launches that follow one another fit
# on a processor, so that the second reads ahead while the first ends.
_SHARED, _HALF = 225 * 1024, 112 * 1024
# few_rows.cu: rows of a program; warps that multiply, each one block of a stage; stages, at most and least.
_FEW_ROWS, _FEW_WARPS, _FEW_STAGES, _FEW_LEAST = (1, 2, 4, 8), 16, 5, 3
# many_rows.cu: rows of a program, at most; stages of activations, at most.
_MANY_ROWS, _MANY_STAGES = (8, 16, 32, 64, 128), 8
# From so many weights on, small batches are computed by more warps, for more output channels at a time.
_LARGE = 96 * 2**20


@dataclasses.dataclass(frozen=True)
class Launch:
    """A program, its constants, its grid, its threads and bytes of shared memory.

    `partial`: floats of sums that programs share; `block_rows`: rows that are brought at once. Both are 0 for
    few_rows.cu.
    """

    program: str
    constants: tuple[tuple[str, int], ...]
    programs: int
    threads: int
    shared: int
    partial: int = 0
    block_rows: int = 0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Measures of a weight; `parts`: groups in a block of 128 input channels."""

    out_features: int
    in_features: int
    parts: int


@functools.lru_cache(maxsize=4096)
def launch_for(rows: int, shape: Shape, bfloat16: bool, processors: int) -> Launch:
    """The launch for a product of `rows` rows, fewer than `DENSE_ROWS`."""
    few = _few(rows, shape, bfloat16, processors) if rows <= _FEW_ROWS[-1] else None
    return few or _many(rows, shape, bfloat16, processors)


def most_tiles(out_features: int) -> int:
    """Tiles whose sums may be shared, in any product with fewer than `DENSE_ROWS` rows, at most."""
    return -(-out_features // 128) * -(-DENSE_ROWS // _MANY_ROWS[-1])


def _few(rows: int, shape: Shape, bfloat16: bool, processors: int) -> Launch | None:
    """A launch of few_rows.cu, or None where the activations leave too little shared memory."""
    block_rows = next(size for size in _FEW_ROWS if rows <= size)
    across = shape.in_features // BLOCK
    inputs = block_rows * (2 * shape.in_features + 4 * across * shape.parts)
    taken = inputs + 2 * _FEW_WARPS * TILE * 4 * block_rows
    stage = _FEW_WARPS * block_bytes(shape.parts) + 16
    stages = min(_FEW_STAGES, (_SHARED - taken) // stage)
    if stages < _FEW_LEAST:
        return None
    if (_HALF - taken) // stage == stages - 1:
        stages -= 1
    constants = {"BF16": int(bfloat16), "PARTS": shape.parts, "ROWS": block_rows, "STAGES": stages}
    return Launch(
        "few_rows",
        tuple(constants.items()),
        min(processors, shape.out_features // TILE),
        32 * (_FEW_WARPS + 1),
        taken + stages * stage,
    )


def _many(rows: int, shape: Shape, bfloat16: bool, processors: int) -> Launch:
    """A launch of many_rows.cu."""
    block_rows = next((size for size in _MANY_ROWS if rows <= size), _MANY_ROWS[-1])
    large = shape.out_features * shape.in_features >= _LARGE
    groups = 2 if block_rows > 64 else 4 if block_rows <= 32 and large else 3
    depth = 4 if groups == 3 else 6
    codes = depth * 4 * groups * block_bytes(shape.parts)
    of_stage = 2 * BLOCK * block_rows
    stages = min(_MANY_STAGES, (_SHARED - 2048 - codes) // of_stage)
    tiles = -(-shape.out_features // (64 * groups)) * -(-rows // block_rows)
    programs = min(processors, tiles * (shape.in_features // BLOCK))
    constants = {
        "BF16": int(bfloat16),
        "DEPTH": depth,
        "GROUPS": groups,
        "PARTS": shape.parts,
        "ROWS": block_rows,
        "STAGES": stages,
    }
    return Launch(
        "many_rows",
        tuple(constants.items()),
        programs,
        128 * (groups + 1),
        stages * of_stage + codes + 1024,
        2 * programs * 128 * groups * block_rows // 2,
        block_rows,
    )

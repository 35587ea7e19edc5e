"""How each product is launched: a table by rows and shape, measured once, never searched at the user's.

Measured on an H100 and an H200 (132 processors) on the layers of Llamas of 8 and 70 billion weights, in
groups of 128 (`benchmarks/gpu_kernels.py`). What moves to other devices is the rule, not the numbers: enough
programs to fill the processors, no more shares of a sum than that takes, and pipelines that fit the shared
memory.
"""

from __future__ import annotations

import dataclasses
import functools

# From this many rows on, writing the weight out as floats for a dense product takes less time.
DENSE_ROWS = 384
# Rows that one program of `few_rows` computes.
FEW_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Device:
    """Compute capability (90 for 9.0), processors, bytes of shared memory that a program may have."""

    capability: int
    processors: int
    shared: int
    hip: bool = False

    @property
    def launches_early(self) -> bool:
        """Whether a launch can begin before the one ahead of it has ended."""
        return self.capability >= 90 and not self.hip


@dataclasses.dataclass(frozen=True)
class Launch:
    """Measures of a launch.

    `side` chunks are multiplied side by side, one for each warp, when that is not 0: a launch of `few_rows`.
    `early`: it may begin before the launch ahead of it has ended. Otherwise `split` programs share a sum.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    side: int = 0
    split: int = 1
    early: bool = False


# For rows up to; rows and output channels of a program; warps; programs that a processor runs at once.
_MANY = ((16, 16, 64, 2, 4), (32, 32, 64, 4, 3), (DENSE_ROWS, 64, 64, 4, 2))
# For more output channels than programs of the first line run at once.
_BROAD = (16, 16, 32, 1, 6)
# On Hopper, where there is enough to do: fewer programs that unpack each weight for more rows.
_WIDE = (32, 32, 128, 4, 2)
_LARGE = (DENSE_ROWS, 128, 128, 8, 1)
_HOPPER = 90
# Compiled and checked under the interpreter; no such device has been measured.
_MANY_HIP = ((16, 16, 64, 4, 2), (32, 32, 64, 4, 2), (DENSE_ROWS, 64, 64, 8, 2))
# Numbers of shares of a sum; what it takes to begin and to end one, in chunks; what more of them must save.
_SPLITS = (2, 3, 4, 8)
_FIXED = 5
_SAVED = 0.07


@functools.lru_cache(maxsize=4096)
def launch_for(rows: int, out_features: int, in_features: int, plane: int, device: Device) -> Launch:
    """The launch for a product of `rows` rows, fewer than `DENSE_ROWS`.

    Args:
        plane: channels that one nibble of a chunk's words holds.
    """
    if rows <= FEW_ROWS and not device.hip:
        return _few(rows, out_features, in_features, plane, device)
    _, block_m, block_n, warps, resident = _many(rows, out_features, in_features, device)
    tiles = -(-rows // block_m) * -(-out_features // block_n)
    chunks = -(-in_features // (4 * plane))
    split = _split(tiles, chunks, device.processors * resident)
    stages = _stages((block_n + 4 * block_m) * plane * 2, 3, device)
    return Launch(block_m, block_n, warps, stages, split=split)


def _many(rows: int, out_features: int, in_features: int, device: Device) -> tuple[int, int, int, int, int]:
    table = _MANY_HIP if device.hip else _MANY
    usual = next(line for line in table if rows <= line[0])
    if not device.hip and rows <= 16 and out_features > 64 * 6 * device.processors:
        return _BROAD
    if device.hip or device.capability != _HOPPER:
        return usual
    much = (
        out_features >= 128 * device.processors or out_features * in_features >= 500_000 * device.processors
    )
    if 16 < rows <= 32 and much:
        return _WIDE
    tiles = -(-rows // 64) * -(-out_features // 64)
    if rows > 64 and (tiles > 2 * device.processors or in_features >= 8192):
        return _LARGE
    return usual


def _split(tiles: int, chunks: int, places: int) -> int:
    """Programs that share a sum, so that those of the last turn fill the device's places.

    Args:
        tiles: programs if none is shared.
        chunks: steps of one that is not shared.
        places: programs that run at once.
    """

    def steps(split: int) -> int:
        return -(-tiles * split // places) * (-(-chunks // split) + _FIXED)

    best = 1
    for split in _SPLITS:
        if chunks >= 4 * split and steps(split) < (1 - _SAVED) * steps(best):
            best = split
    return best


def most_tiles(out_features: int) -> int:
    """Tiles of the largest launch in which programs share sums."""
    return DENSE_ROWS // 64 * -(-out_features // 64)


def _few(rows: int, out_features: int, in_features: int, plane: int, device: Device) -> Launch:
    """Few programs read more side by side; many programs leave that to one another."""
    # Output channels for each processor.
    share = out_features / device.processors
    if share <= 16:
        block_n, side, stages = 16, 4, 4
    elif share <= 40:
        block_n, side, stages = 32, 4, 4
    elif 150 < share <= 256:
        block_n, side, stages = 64, 2, 2 if rows == 1 else 3
    elif rows == 1 and in_features >= 8192:
        block_n, side, stages = 32, 4, 3
    else:
        block_n, side, stages = 32, 2, 4 if share <= 64 else 3
    if plane < 64:
        block_n, side, stages = min(block_n, 32), 4, 4
    rows_read = 1 if rows == 1 else FEW_ROWS
    stages = _stages(side * (block_n + 4 * rows_read) * plane * 2, stages, device)
    # Programs that begin early settle where others have not ended yet, and unevenly. It pays for few warps,
    # and for the many of a layer so wide that it is a merge: what runs ahead of that is short.
    warps = -(-out_features // block_n) * side / device.processors
    early = device.launches_early and (block_n == 64 or warps <= (8 if rows == 1 else 6))
    return Launch(FEW_ROWS, block_n, side, stages, side=side, early=early)


def _stages(bytes_of_one: int, wished: int, device: Device) -> int:
    """Steps under way at once: one is computed on while the others are being read."""
    if device.hip:
        return 2
    # Scales and sums take some of the memory too.
    return max(2, min(wished, 1 + (device.shared - 6 * 1024) // bytes_of_one))


def plane_of(group_size: int) -> int:
    """Channels to a nibble of a chunk's words: must divide the group size, and wider is faster."""
    return 64 if group_size % 64 == 0 else 32


def planes_per_group(group_size: int, plane: int) -> int:
    """Planes of a chunk that surely share a group: 1, 2 or 4."""
    chunk = 4 * plane
    if group_size % chunk == 0:
        return 4
    return group_size // plane if chunk % group_size == 0 else 1

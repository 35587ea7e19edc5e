"""The arrangement of a weight for Hopper's matrix units, and its way back.

A block holds 16 output channels by 128 input channels: 1024 bytes of codes, and for each group in it 16 words
of scale and zero point, int32: the bits of a float32, of which the lowest four are the zero point. Blocks of
the same output channels follow one another.

A block's codes are eight operands of 16 x 16, two times four; an operand's codes are one word for each of a
warp's 32 threads. Thread 4 g + t holds the codes of output channels g and g + 8, and of input channels 2 t,
2 t + 1, 2 t + 8 and 2 t + 9. Nibble i of its word is that of output channel g + 8 (i % 2) and input channel
2 t + 8 (i // 2 % 2) + i // 4, so that masking the word gives two codes in the places of two numbers of 16
bits. The words of four operands lie side by side for each thread: 16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16
BLOCK = 128
_CODES = TILE * BLOCK // 2
# Output channel g + 8 r, input channel 64 half + 16 step + 8 h + 2 t + e. In the canonical codes the order is
# tile, r, g, block, half, step, h, t, e; these are the sizes without tile and block.
_CANONICAL = (2, 8, 2, 4, 2, 4, 2)
# In blocks it is tile, block, half, g, t, step, e, h, r: where each stood.
_ORDER = (0, 3, 4, 2, 7, 5, 8, 6, 1)


def parts_of(group_size: int) -> int:
    """Groups in a block: 1, 2 or 4."""
    return max(1, BLOCK // group_size)


def block_bytes(parts: int) -> int:
    """Bytes of a block with so many groups."""
    return _CODES + 4 * TILE * parts


def pack(codes: Tensor, pairs: Tensor, group_size: int) -> Tensor:
    """Blocks uint8 `[out / 16, in / 128, bytes]`.

    Args:
        codes: uint8 `[out, in]`, below 16.
        pairs: int32 `[out, groups]`, scales with their zero points.
        group_size: 32, 64, or a multiple of 128.
    """
    tiles, across = codes.shape[0] // TILE, codes.shape[1] // BLOCK
    r, g, half, step, h, t, e = _CANONICAL
    nibbles = codes.view(tiles, r, g, across, half, step, h, t, e).permute(_ORDER)
    nibbles = nibbles.reshape(tiles, across, _CODES, 2)
    words = nibbles[..., 0] | nibbles[..., 1] << 4
    parts = parts_of(group_size)
    if group_size > BLOCK:
        pairs = pairs.repeat_interleave(group_size // BLOCK, dim=1)
    scales = pairs.view(tiles, TILE, across, parts).permute(0, 2, 3, 1).contiguous()
    return torch.cat([words, scales.view(torch.uint8).view(tiles, across, -1)], dim=2)


def codes_of(blocks: Tensor) -> Tensor:
    """The codes uint8 `[out, in]` of blocks."""
    tiles, across, _ = blocks.shape
    words = blocks[..., :_CODES]
    nibbles = torch.stack([words & 15, words >> 4], dim=-1)
    shape = (tiles, *_CANONICAL[:2], across, *_CANONICAL[2:])
    lying = nibbles.view([tiles, across, *(shape[axis] for axis in _ORDER[2:])])
    back = [_ORDER.index(axis) for axis in range(len(_ORDER))]
    return lying.permute(back).reshape(tiles * TILE, across * BLOCK)


def pairs_of(blocks: Tensor, group_size: int) -> Tensor:
    """The pairs int32 `[out, groups]` of blocks."""
    tiles, across, _ = blocks.shape
    pairs = blocks[..., _CODES:].contiguous().view(torch.int32).view(tiles, across, -1, TILE)
    pairs = pairs.permute(0, 3, 1, 2).reshape(tiles * TILE, -1)
    return pairs[:, :: max(1, group_size // BLOCK)].contiguous()

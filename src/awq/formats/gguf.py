"""GGUF's Q4_1 blocks, which hold 4-bit codes with a scale and an offset as they are.

A row of K inputs is K / 32 blocks of 20 bytes:

    float16  scale
    float16  offset, -zero * scale
    16 bytes codes: the low nibbles hold inputs 0 to 15, the high ones 16 to 31

The value is scale * code + offset. Groups of g inputs become g / 32 blocks with the same scale and offset.
Rounding the offset to float16 moves a value by less than 0.4 % of its scale, and the zero point can still be
told from it: see `integer_zeros`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq.errors import ConfigError
from awq.formats.layout import divides, integer_zeros, refuse, scaled_zeros
from awq.weight import QuantizedWeight

BLOCK, BLOCK_BYTES = 32, 20


def supports(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layer cannot be held, or None when it can."""
    if bits != 4:
        return f"Q4_1 holds 4 bits, not {bits}"
    if group_size % BLOCK:
        return f"groups of {group_size} are no whole blocks of {BLOCK}"
    return divides(in_features, group_size)


def pack(weight: QuantizedWeight) -> Tensor:
    """Blocks uint8 `[out_features, in_features / 32 * 20]`.

    Raises:
        ConfigError: the blocks cannot hold the weight.
    """
    refuse(supports(weight.out_features, weight.in_features, weight.group_size, weight.bits))
    scales = weight.scales.to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise ConfigError("a scale is too large for float16, which Q4_1 stores")
    repeat = weight.group_size // BLOCK
    heads = torch.stack((scales, scaled_zeros(weight, torch.float16)), dim=-1).repeat_interleave(
        repeat, dim=1
    )
    halves = weight.codes.view(weight.out_features, -1, 2, BLOCK // 2)
    octets = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return torch.cat((heads.view(torch.uint8), octets), dim=-1).flatten(1)


def unpack(blocks: Tensor) -> QuantizedWeight:
    """The weight behind `[out_features, blocks * 20]` bytes, in groups of 32.

    Raises:
        CorruptFileError: an offset is no zero point.
    """
    parts = blocks.view(blocks.shape[0], -1, BLOCK_BYTES)
    heads = parts[..., :4].contiguous().view(torch.float16)
    octets = parts[..., 4:]
    codes = torch.stack((octets & 15, octets >> 4), dim=2).flatten(1)
    scales = heads[..., 0].contiguous()
    return QuantizedWeight(codes, scales, integer_zeros(heads[..., 1], scales, 4))

"""AutoAWQ's Marlin layout: symmetric codes in the order in which the tensor cores take them.

For a linear layer of K inputs and N outputs with groups of g inputs:

    qweight  int32   [K / 16, 2 * N]  codes in tiles of 16 x 16, permuted within four tiles
    scales   float16 [K / g, N]       permuted within 64 columns (32 when a row is one group)

There are no zero points: each one is 8. Engines have kernels that take zero points too, and no layout on disk
for them: they arrange the tensors of a GEMM checkpoint when they load it.
Source: the Marlin kernel, and AutoAWQ 0.2.9.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awq.errors import ConfigError
from awq.formats.layout import (
    LayerShape,
    divides,
    exact_scales,
    grouped,
    pack_nibbles,
    refuse,
    unpack_nibbles,
)
from awq.weight import QuantizedWeight

names = ("qweight", "scales")
optional: tuple[str, ...] = ()
_TILE = 16


def supports(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layer cannot be held, or None when it can."""
    if bits != 4:
        return f"the layout holds 4 bits, not {bits}"
    if out_features % 64 or in_features % _TILE:
        return f"{out_features} outputs of {in_features} inputs do not divide by 64 and {_TILE}"
    return divides(in_features, group_size)


def packed_shapes(
    out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype, bits: int = 4
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor, by suffix. Scales are float16, whatever is asked."""
    return {
        "qweight": (torch.int32, (in_features // _TILE, out_features * 2)),
        "scales": (torch.float16, (in_features // group_size, out_features)),
    }


def measure(shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
    """The layer's measures; the shapes alone tell them."""
    tiles, words = shapes["qweight"]
    return grouped(words // 2, tiles * _TILE, shapes["scales"][0])


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Pack a weight.

    Raises:
        ConfigError: the layout cannot hold the weight: a zero point is not 8.
    """
    refuse(supports(weight.out_features, weight.in_features, weight.group_size, weight.bits))
    if bool((weight.zeros != 8).any()):
        raise ConfigError(
            "a zero point is not 8: the marlin layout holds symmetric codes only; use gemm, which engines "
            "arrange for Marlin when they load it"
        )
    rows, columns = weight.in_features // _TILE, weight.out_features // _TILE
    tiles = weight.codes.t().reshape(rows, _TILE, columns, _TILE).transpose(1, 2)
    fours = tiles.reshape(-1, 4 * _TILE * _TILE)[:, _tile_order()]
    scales = exact_scales(weight.scales, torch.float16).t()
    order = _scale_order(scales.shape[0] == 1)
    return {
        "qweight": pack_nibbles(fours.reshape(rows, -1), even_first=True),
        "scales": scales.reshape(-1, len(order))[:, order].view(scales.shape).contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None) -> QuantizedWeight:
    """Undo `pack`, exactly."""
    nibbles = unpack_nibbles(tensors["qweight"], even_first=True)
    rows, columns = nibbles.shape[0], nibbles.shape[1] // (_TILE * _TILE)
    fours = nibbles.reshape(-1, 4 * _TILE * _TILE)[:, _tile_order().argsort()]
    codes = fours.reshape(rows, columns, _TILE, _TILE).transpose(1, 2).reshape(rows * _TILE, columns * _TILE)
    stored = tensors["scales"]
    order = _scale_order(stored.shape[0] == 1).argsort()
    scales = stored.reshape(-1, len(order))[:, order].view(stored.shape).t().contiguous()
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    return QuantizedWeight(codes.t().contiguous(), scales, zeros, bits)


def _tile_order() -> Tensor:
    """Which of the 1024 codes of four neighbouring tiles comes at each place.

    Place (thread, tile, column half, row) of a warp of 32 threads: thread t holds column t // 4 of each half
    and the rows 2r, 2r + 1, 2r + 8, 2r + 9 for r = t % 4, as the `mma` instruction wants its operands.
    """
    thread = torch.arange(32).view(32, 1, 1, 1)
    tile = torch.arange(4).view(1, 4, 1, 1)
    half = torch.arange(2).view(1, 1, 2, 1)
    row = 2 * (thread % 4) + torch.tensor([0, 1, 8, 9])
    return (256 * tile + 16 * row + thread // 4 + 8 * half).flatten()


def _scale_order(one_group: bool) -> Tensor:
    """Which column of its run comes at each place: as the threads of a warp want them."""
    if one_group:
        return (2 * torch.arange(4).view(4, 1) + torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])).flatten()
    return (torch.arange(8).view(8, 1) + 8 * torch.arange(8)).flatten()

"""AutoAWQ's GEMM layout, the one that vLLM, SGLang, LMDeploy, transformers and mlx-lm read.

For a linear layer of K inputs and N outputs with groups of g inputs:

    qweight  int32   [K, N / 8]      codes, transposed, eight columns to a word
    qzeros   int32   [K / g, N / 8]  zero points in the same way, with no offset
    scales   float16 [K / g, N]      (bfloat16 is allowed)

Nibble i of a word, counted from the low bits, holds column [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight.
Source: AutoAWQ 0.2.9's checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq.errors import ConfigError
from awq.weight import QuantizedWeight

# Column held by each nibble, and the nibble that holds each column.
_COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def supports(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layer cannot be held, or None when it can."""
    if bits != 4:
        return f"the layout holds 4 bits, not {bits}"
    if in_features % group_size:
        return f"{in_features} input channels do not divide into groups of {group_size}"
    if out_features % 8:
        return f"{out_features} output channels do not divide by 8"
    return None


def packed_shapes(
    out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor, by suffix."""
    groups = in_features // group_size
    return {
        "qweight": (torch.int32, (in_features, out_features // 8)),
        "qzeros": (torch.int32, (groups, out_features // 8)),
        "scales": (scales_dtype, (groups, out_features)),
    }


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Pack a weight.

    Returns:
        `qweight`, `qzeros` int32 and `scales` in the weight's own dtype, shaped as in the module's docstring.

    Raises:
        ConfigError: the layout cannot hold the weight.
    """
    reason = supports(weight.out_features, weight.in_features, weight.group_size, weight.bits)
    if reason:
        raise ConfigError(reason)
    return {
        "qweight": _pack_columns(weight.codes.t()),
        "qzeros": _pack_columns(weight.zeros.t()),
        "scales": weight.scales.t().contiguous(),
    }


def unpack(tensors: dict[str, Tensor], bits: int = 4) -> QuantizedWeight:
    """Undo `pack`, exactly.

    Raises:
        ConfigError: the tensors do not belong together.
    """
    if bits != 4:
        raise ConfigError(f"the gemm layout holds 4 bits, not {bits}")
    return QuantizedWeight(
        codes=_unpack_columns(tensors["qweight"]).t().contiguous(),
        scales=tensors["scales"].t().contiguous(),
        zeros=_unpack_columns(tensors["qzeros"]).t().contiguous(),
        bits=4,
    )


def _pack_columns(values: Tensor) -> Tensor:
    """Nibbles uint8 `[rows, columns]` as words int32 `[rows, columns / 8]`."""
    nibbles = values.reshape(values.shape[0], -1, 8)[..., list(_COLUMN_OF_NIBBLE)]
    # Two nibbles make a byte, and four little-endian bytes a word: no arithmetic on signed words.
    octets = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return octets.contiguous().view(torch.int32).squeeze(-1)


def _unpack_columns(words: Tensor) -> Tensor:
    """Words int32 `[rows, n]` as nibbles uint8 `[rows, 8 * n]`."""
    octets = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    nibbles = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    return nibbles[..., list(_NIBBLE_OF_COLUMN)].flatten(-2)

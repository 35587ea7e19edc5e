"""AutoAWQ's GEMV layout, which llm-awq's first checkpoints share.

For a linear layer of K inputs and N outputs with groups of g inputs, and w = `padded_words(K, g)`:

    qweight  int32   [N, K / 8]  codes, eight neighbours to a word, the first one in the low bits
    qzeros   int32   [N, w]      zero points in the same way, the row padded with zeros
    scales   float16 [N, 8 * w]  padded with zeros too

Its kernels fetch one word of zero points for each 1024 inputs, whole: hence the padding.
Source: AutoAWQ 0.2.9's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from awq.errors import CorruptFileError
from awq.formats.layout import (
    LayerShape,
    divides,
    exact_scales,
    pack_nibbles,
    refuse,
    unpack_nibbles,
    whole_row,
)
from awq.weight import QuantizedWeight

names = ("qweight", "qzeros", "scales")
optional: tuple[str, ...] = ()


def padded_words(in_features: int, group_size: int) -> int:
    """Words of eight zero points to a row: as many as the groups need, rounded up to 1, 2 or 4."""
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    words = -(-(in_features // group_size) // 8)
    return -(-words // multiple) * multiple


def groups_supported(in_features: int, group_size: int) -> str | None:
    """Why the padded layouts cannot hold such groups, or None when they can."""
    if group_size not in (32, 64) and group_size < 128:
        return f"the layout knows groups of 32, 64, and 128 or more, not {group_size}"
    return divides(in_features, group_size)


def supports(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layer cannot be held, or None when it can."""
    if bits != 4:
        return f"the layout holds 4 bits, not {bits}"
    if out_features % 8:
        return f"{out_features} output channels do not divide by 8"
    if in_features % 32:
        return f"{in_features} input channels do not divide by 32"
    return groups_supported(in_features, group_size)


def packed_shapes(
    out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype, bits: int = 4
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor, by suffix. Scales are float16, whatever is asked."""
    words = padded_words(in_features, group_size)
    return {
        "qweight": (torch.int32, (out_features, in_features // 8)),
        "qzeros": (torch.int32, (out_features, words)),
        "scales": (torch.float16, (out_features, words * 8)),
    }


def measure(shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
    """The layer's measures; the group size is the configuration's, since scales are padded."""
    out_features, words = shapes["qweight"]
    size = whole_row(group_size, words * 8)
    if shapes["scales"] != (out_features, padded_words(words * 8, size) * 8):
        raise CorruptFileError(
            f"scales of shape {shapes['scales']} do not fit {out_features} outputs of {words * 8} inputs in "
            f"groups of {size}"
        )
    return LayerShape(out_features, words * 8, size)


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Pack a weight.

    Raises:
        ConfigError: the layout cannot hold the weight.
    """
    refuse(supports(weight.out_features, weight.in_features, weight.group_size, weight.bits))
    groups = weight.scales.shape[1]
    padding = (0, padded_words(weight.in_features, weight.group_size) * 8 - groups)
    return {
        "qweight": pack_nibbles(weight.codes),
        "qzeros": pack_nibbles(pad(weight.zeros, padding)),
        "scales": pad(exact_scales(weight.scales, torch.float16), padding).contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None) -> QuantizedWeight:
    """Undo `pack`, exactly.

    Raises:
        CorruptFileError: the group size is not that of the tensors.
    """
    codes = unpack_nibbles(tensors["qweight"])
    groups = codes.shape[1] // whole_row(group_size, codes.shape[1])
    return QuantizedWeight(
        codes=codes,
        scales=without_padding(tensors["scales"], groups),
        zeros=unpack_nibbles(tensors["qzeros"])[:, :groups].contiguous(),
        bits=bits,
    )


def without_padding(scales: Tensor, groups: int) -> Tensor:
    """The first `groups` columns of `[N, padded]`.

    Raises:
        CorruptFileError: there are fewer, or something stands behind them.
    """
    if scales.shape[1] < groups or bool((scales[:, groups:] != 0).any()):
        raise CorruptFileError(
            f"the scales are not those of {groups} groups in a row: the configuration's group size is wrong"
        )
    return scales[:, :groups].contiguous()

"""The `pack-quantized` layout of compressed-tensors (llm-compressor, vLLM), with 4 bits.

For a linear layer of K inputs and N outputs with groups of g inputs:

    weight_packed      int32   [N, K / 8]      codes, eight inputs to a word, the first one in the low bits
    weight_scale       float   [N, K / g]
    weight_zero_point  int32   [N / 8, K / g]  zero points, eight outputs to a word; absent when symmetric
    weight_shape       int64   [2]             N, K

Its own arithmetic counts codes and zero points from -8; both are stored with 8 added, so the bits are those
of unsigned ones. Symmetric means that each zero point is 8."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awq.errors import CorruptFileError
from awq.formats.gptq import group_order
from awq.formats.layout import LayerShape, grouped, pack_nibbles, refuse, unpack_nibbles, words_both_ways
from awq.weight import QuantizedWeight

names = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
optional = ("weight_zero_point", "weight_g_idx")


def supports(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layer cannot be held, or None when it can."""
    return words_both_ways(out_features, in_features, group_size, bits)


def packed_shapes(
    out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor, by suffix."""
    groups = in_features // group_size
    return {
        "weight_packed": (torch.int32, (out_features, in_features // 8)),
        "weight_scale": (scales_dtype, (out_features, groups)),
        "weight_zero_point": (torch.int32, (out_features // 8, groups)),
        "weight_shape": (torch.int64, (2,)),
    }


def measure(shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
    """The layer's measures; the shapes alone tell them."""
    out_features, words = shapes["weight_packed"]
    return grouped(out_features, words * 8, shapes["weight_scale"][1])


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Pack a weight, always with its zero points.

    Raises:
        ConfigError: the layout cannot hold the weight.
    """
    refuse(supports(weight.out_features, weight.in_features, weight.group_size, weight.bits))
    return {
        "weight_packed": pack_nibbles(weight.codes),
        "weight_scale": weight.scales.contiguous(),
        "weight_zero_point": pack_nibbles(weight.zeros.t()).t().contiguous(),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64),
    }


def unpack(tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None) -> QuantizedWeight:
    """Undo `pack`, exactly.

    Raises:
        CorruptFileError: the tensors do not belong together, or groups are scattered by act-order.
    """
    codes, scales = unpack_nibbles(tensors["weight_packed"]), tensors["weight_scale"]
    if tensors["weight_shape"].tolist() != list(codes.shape):
        raise CorruptFileError(
            f"weight_shape says {tensors['weight_shape'].tolist()} where the codes are {list(codes.shape)}"
        )
    packed = tensors.get("weight_zero_point")
    zeros = (
        torch.full(scales.shape, 8, dtype=torch.uint8) if packed is None else unpack_nibbles(packed.t()).t()
    )
    if "weight_g_idx" in tensors:
        order = group_order(tensors["weight_g_idx"], scales.shape[1])
        scales, zeros = scales[:, order], zeros[:, order]
    return QuantizedWeight(codes, scales.contiguous(), zeros.contiguous(), bits)

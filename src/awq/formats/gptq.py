"""The layout of GPTQ checkpoints (AutoGPTQ, GPTQModel), in its two versions.

For a linear layer of K inputs and N outputs with groups of g inputs:

    qweight  int32   [K / 8, N]      codes, eight inputs to a word, the first one in the low bits
    qzeros   int32   [K / g, N / 8]  zero points, eight outputs to a word; version 1 stores them minus 1
    scales   float16 [K / g, N]
    g_idx    int32   [K]             the group of each input

Version 1 cannot hold a zero point of 0: minus 1 becomes 15, which some readers take for 0 and others for 16,
and some writers borrowed from the neighbour. Such weights are refused both ways; version 2 holds them all.

A `g_idx` that scatters a group over the row (act-order, `desc_act`) has no form in the other layouts, unless
the inputs themselves are reordered. One that only reorders whole groups is undone exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from awq.errors import ConfigError, CorruptFileError
from awq.formats.layout import LayerShape, grouped, pack_nibbles, refuse, unpack_nibbles, words_both_ways
from awq.weight import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Gptq:
    """The layout, with what is subtracted from zero points on disk: 1 in version 1, 0 in version 2."""

    offset: int
    names: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    optional: tuple[str, ...] = ("g_idx",)

    def supports(self, out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
        """Why a layer cannot be held, or None when it can."""
        return words_both_ways(out_features, in_features, group_size, bits)

    def packed_shapes(
        self, out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor, by suffix."""
        groups = in_features // group_size
        return {
            "qweight": (torch.int32, (in_features // 8, out_features)),
            "qzeros": (torch.int32, (groups, out_features // 8)),
            "scales": (scales_dtype, (groups, out_features)),
            "g_idx": (torch.int32, (in_features,)),
        }

    def measure(self, shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
        """The layer's measures; the shapes alone tell them."""
        words, out_features = shapes["qweight"]
        return grouped(out_features, words * 8, shapes["scales"][0])

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Pack a weight.

        Raises:
            ConfigError: the layout cannot hold the weight.
        """
        refuse(self.supports(weight.out_features, weight.in_features, weight.group_size, weight.bits))
        if self.offset and bool((weight.zeros == 0).any()):
            raise ConfigError(
                "a zero point is 0, which the first version of the GPTQ format cannot hold; use gptq_v2"
            )
        index = torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size
        return {
            "qweight": pack_nibbles(weight.codes).t().contiguous(),
            "qzeros": pack_nibbles(weight.zeros.t() - self.offset),
            "scales": weight.scales.t().contiguous(),
            "g_idx": index,
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None
    ) -> QuantizedWeight:
        """Undo `pack`, exactly.

        Raises:
            CorruptFileError: groups are scattered by act-order, or a zero point is ambiguous.
        """
        codes = unpack_nibbles(tensors["qweight"].t())
        stored = unpack_nibbles(tensors["qzeros"]).t()
        if self.offset and bool((stored == 15).any()):
            raise CorruptFileError(
                "a zero point is stored as 15, which readers of the first GPTQ format take for 0 or for 16"
            )
        scales, zeros = tensors["scales"].t(), stored + self.offset
        if "g_idx" in tensors:
            order = group_order(tensors["g_idx"], scales.shape[1])
            scales, zeros = scales[:, order], zeros[:, order]
        return QuantizedWeight(codes, scales.contiguous(), zeros.contiguous(), bits)


def group_order(index: Tensor, groups: int) -> Tensor:
    """The group of each run of neighbouring inputs, from the group of each input.

    Raises:
        CorruptFileError: a run's inputs belong to several groups (act-order).
    """
    runs = index.view(groups, -1) if index.numel() % groups == 0 else index.view(1, -1)
    order = runs[:, 0].long()
    if bool((runs != runs[:, :1]).any()) or not torch.equal(order.sort().values, torch.arange(groups)):
        raise CorruptFileError(
            "act-order (desc_act) scatters the groups over the row, which no other layout can express; "
            "quantize again with desc_act=False"
        )
    return order


gptq = Gptq(1)
gptq_v2 = Gptq(0)

"""The layout of GPTQ checkpoints (AutoGPTQ, GPTQModel), in its two versions.

For a linear layer of K inputs and N outputs with groups of g inputs and codes of b bits:

    qweight  int32   [K * b / 32, N]      codes, input by input, the first one in the low bits of a word
    qzeros   int32   [K / g, N * b / 32]  zero points, output by output; version 1 stores them minus 1
    scales   float16 [K / g, N]
    g_idx    int32   [K]                  the group of each input

With 3 bits some codes begin in one word and end in the next: 32 of them fill three words.

Version 1 cannot hold a zero point of 0: minus 1 becomes all ones (15 with 4 bits), which some readers take
for 0 and others for 16, and some writers borrowed from the neighbour. Such weights are refused both ways;
version 2 holds them all.

A `g_idx` that scatters a group over the row (act-order, `desc_act`) has no form in the other layouts, unless
the inputs themselves are reordered. One that only reorders whole groups is undone exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from awq.config import FORMAT_BITS
from awq.errors import ConfigError, CorruptFileError
from awq.formats.layout import LayerShape, grouped, refuse, words_both_ways
from awq.formats.stream import codes_in, pack_stream, unpack_stream
from awq.weight import QuantizedWeight

_BITS = FORMAT_BITS["gptq"]


@dataclasses.dataclass(frozen=True)
class Gptq:
    """The layout, with what is subtracted from zero points on disk: 1 in version 1, 0 in version 2."""

    offset: int
    names: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    optional: tuple[str, ...] = ("g_idx",)

    def supports(self, out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
        """Why a layer cannot be held, or None when it can."""
        if bits not in _BITS:
            return f"GPTQ checkpoints hold {', '.join(map(str, _BITS))} bits, not {bits}"
        return words_both_ways(out_features, in_features, group_size, bits)

    def packed_shapes(
        self, out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype, bits: int = 4
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor, by suffix."""
        groups = in_features // group_size
        return {
            "qweight": (torch.int32, (in_features * bits // 32, out_features)),
            "qzeros": (torch.int32, (groups, out_features * bits // 32)),
            "scales": (scales_dtype, (groups, out_features)),
            "g_idx": (torch.int32, (in_features,)),
        }

    def measure(self, shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
        """The layer's measures; the width of a code must be known."""
        words, out_features = shapes["qweight"]
        return grouped(out_features, codes_in(words, bits), shapes["scales"][0])

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
            "qweight": pack_stream(weight.codes, weight.bits).t().contiguous(),
            "qzeros": pack_stream(weight.zeros.t() - self.offset, weight.bits),
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
        codes = unpack_stream(tensors["qweight"].t(), bits)
        stored = unpack_stream(tensors["qzeros"], bits).t()
        most = 2**bits - 1
        if self.offset and bool((stored == most).any()):
            raise CorruptFileError(
                f"a zero point is stored as {most}, which readers of the first GPTQ format take for 0 or for "
                f"{most + 1}"
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

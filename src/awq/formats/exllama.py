"""The arrangement that ExLlama's kernels take: that of GPTQ's first version, without a group index.

It is never on disk: AutoAWQ's `exllama` checkpoints are GEMM ones, rearranged when loaded. The zero points
are stored as (z - 1) & 15; the kernels add the 1 again and wrap. AutoAWQ subtracts without wrapping, so
there a zero point of 0 borrows from its neighbour in the word."""

from __future__ import annotations

from torch import Tensor

from awq.formats.gptq import gptq_v2
from awq.formats.layout import pack_nibbles, unpack_nibbles
from awq.weight import QuantizedWeight


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """`qweight` int32 `[K / 8, N]`, `qzeros` int32 `[K / g, N / 8]`, `scales` `[K / g, N]`.

    Raises:
        ConfigError: the layout cannot hold the weight.
    """
    packed = gptq_v2.pack(weight)
    packed["qzeros"] = pack_nibbles((weight.zeros.t() - 1) & 15)
    del packed["g_idx"]
    return packed


def unpack(tensors: dict[str, Tensor]) -> QuantizedWeight:
    """Undo `pack`, exactly."""
    weight = gptq_v2.unpack(tensors)
    zeros = (unpack_nibbles(tensors["qzeros"]).t() + 1) & 15
    return QuantizedWeight(weight.codes, weight.scales, zeros.contiguous())

"""The `pack-quantized` layout of compressed-tensors (llm-compressor, vLLM), asymmetric and symmetric.

For a linear layer of K inputs and N outputs with groups of g inputs and codes of b bits:

    weight_packed      int32   [N, K * b / 32]      codes, input by input, the first one in the low bits
    weight_scale       float   [N, K / g]
    weight_zero_point  int32   [N * b / 32, K / g]  zero points, output by output; absent when symmetric
    weight_shape       int64   [2]                  N, K

Its own arithmetic counts codes and zero points from -2**(b - 1); both are stored with that added, so the bits
are those of unsigned ones. Symmetric means that each zero point is 2**(b - 1), the middle code.

Other widths than 2, 4 and 8 are left out: versions of compressed-tensors disagree about codes that do not
fill a word evenly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from awq.config import FORMAT_BITS
from awq.errors import ConfigError, CorruptFileError
from awq.formats.gptq import group_order
from awq.formats.layout import LayerShape, grouped, refuse, words_both_ways
from awq.formats.stream import codes_in, pack_stream, unpack_stream
from awq.weight import QuantizedWeight

_BITS = FORMAT_BITS["compressed-tensors"]
_NAMES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """The layout, as it is written; what is read may be of either kind."""

    symmetric: bool
    names: tuple[str, ...] = _NAMES
    optional: tuple[str, ...] = ("weight_zero_point", "weight_g_idx")

    def supports(self, out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
        """Why a layer cannot be held, or None when it can."""
        if bits not in _BITS:
            return f"compressed-tensors checkpoints hold {', '.join(map(str, _BITS))} bits here, not {bits}"
        return words_both_ways(out_features, in_features, group_size, bits)

    def packed_shapes(
        self, out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype, bits: int = 4
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor, by suffix."""
        groups = in_features // group_size
        zeros = {"weight_zero_point": (torch.int32, (out_features * bits // 32, groups))}
        return {
            "weight_packed": (torch.int32, (out_features, in_features * bits // 32)),
            "weight_scale": (scales_dtype, (out_features, groups)),
            **({} if self.symmetric else zeros),
            "weight_shape": (torch.int64, (2,)),
        }

    def measure(self, shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
        """The layer's measures; the width of a code must be known."""
        out_features, words = shapes["weight_packed"]
        return grouped(out_features, codes_in(words, bits), shapes["weight_scale"][1])

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Pack a weight.

        Raises:
            ConfigError: the layout cannot hold the weight.
        """
        refuse(self.supports(weight.out_features, weight.in_features, weight.group_size, weight.bits))
        if self.symmetric and not weight.symmetric:
            raise ConfigError(
                f"a zero point is not {weight.middle}, the middle code, in a checkpoint said to be symmetric"
            )
        zeros = {"weight_zero_point": pack_stream(weight.zeros.t(), weight.bits).t().contiguous()}
        return {
            "weight_packed": pack_stream(weight.codes, weight.bits),
            "weight_scale": weight.scales.contiguous(),
            **({} if self.symmetric else zeros),
            "weight_shape": torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None
    ) -> QuantizedWeight:
        """Undo `pack`, exactly.

        Raises:
            CorruptFileError: the tensors do not belong together, or groups are scattered by act-order.
        """
        codes, scales = unpack_stream(tensors["weight_packed"], bits), tensors["weight_scale"]
        if tensors["weight_shape"].tolist() != list(codes.shape):
            stated = tensors["weight_shape"].tolist()
            raise CorruptFileError(f"weight_shape says {stated} where the codes are {list(codes.shape)}")
        packed = tensors.get("weight_zero_point")
        if packed is None:
            zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
        else:
            zeros = unpack_stream(packed.t(), bits).t()
        if "weight_g_idx" in tensors:
            order = group_order(tensors["weight_g_idx"], scales.shape[1])
            scales, zeros = scales[:, order], zeros[:, order]
        return QuantizedWeight(codes, scales.contiguous(), zeros.contiguous(), bits)


asymmetric = CompressedTensors(False)
symmetric = CompressedTensors(True)

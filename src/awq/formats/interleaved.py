"""The layout of TinyChat's kernels: AutoAWQ's GEMV_FAST and llm-awq's second version.

For a linear layer of K inputs and N outputs with groups of g inputs, and w = `gemv.padded_words(K, g)`:

    qweight                int16   [N / 4, K]   codes, interleaved as below
    scales                 float16 [8 * w, N]   transposed, padded with zeros
    qzeros / scaled_zeros  float16 [8 * w, N]   -zero * scale, in the same way

The zero points' tensor is called `qzeros` by AutoAWQ and `scaled_zeros` by llm-awq; the rest is one. A word
of 16 bits holds four codes. Each run of 32 inputs is first reordered so that a thread finds its own in one
place: of four rounds of eight inputs, the pairs (0, 1), (8, 9), (16, 17), (24, 25) come first, then (2, 3),
(10, 11), …; in each eight of the result the even places come before the odd ones. Then runs of 64 inputs of
four neighbouring rows are laid behind one another.

Sources: AutoAWQ 0.2.9, and mit-han-lab's llm-awq.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from awq.errors import CorruptFileError
from awq.formats.gemv import groups_supported, padded_words, without_padding
from awq.formats.layout import (
    LayerShape,
    exact_scales,
    integer_zeros,
    refuse,
    scaled_zeros,
    whole_row,
)
from awq.weight import QuantizedWeight

_ROWS, _RUN = 4, 64


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """The layout, with the name that a project gives to the zero points."""

    zeros_name: str
    optional: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Suffixes of the tensors."""
        return ("qweight", "scales", self.zeros_name)

    def supports(self, out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
        """Why a layer cannot be held, or None when it can."""
        if bits != 4:
            return f"the layout holds 4 bits, not {bits}"
        if out_features % 8:
            return f"{out_features} output channels do not divide by 8"
        if in_features % _RUN:
            return f"{in_features} input channels do not divide by {_RUN}"
        return groups_supported(in_features, group_size)

    def packed_shapes(
        self, out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype, bits: int = 4
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor, by suffix. Scales are float16, whatever is asked."""
        rows = padded_words(in_features, group_size) * 8
        return {
            "qweight": (torch.int16, (out_features // _ROWS, in_features)),
            "scales": (torch.float16, (rows, out_features)),
            self.zeros_name: (torch.float16, (rows, out_features)),
        }

    def measure(self, shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
        """The layer's measures; the group size is the configuration's, since scales are padded."""
        quarter, in_features = shapes["qweight"]
        size = whole_row(group_size, in_features)
        if shapes["scales"] != (padded_words(in_features, size) * 8, quarter * _ROWS):
            raise CorruptFileError(
                f"scales of shape {shapes['scales']} do not fit {quarter * _ROWS} outputs of {in_features} "
                f"inputs in groups of {size}"
            )
        return LayerShape(quarter * _ROWS, in_features, size)

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Pack a weight. The zero points can be told from their products again: see `integer_zeros`.

        Raises:
            ConfigError: the layout cannot hold the weight.
        """
        refuse(self.supports(weight.out_features, weight.in_features, weight.group_size, weight.bits))
        padding = (0, padded_words(weight.in_features, weight.group_size) * 8 - weight.scales.shape[1])
        scales = exact_scales(weight.scales, torch.float16)
        return {
            "qweight": _interleave(weight.codes),
            "scales": pad(scales, padding).t().contiguous(),
            self.zeros_name: pad(scaled_zeros(weight, torch.float16), padding).t().contiguous(),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None
    ) -> QuantizedWeight:
        """Undo `pack`, exactly (but a zero point with scale 0 comes back as 0).

        Raises:
            CorruptFileError: the group size is not that of the tensors, or an offset is no zero point.
        """
        codes = _separate(tensors["qweight"])
        groups = codes.shape[1] // whole_row(group_size, codes.shape[1])
        scales = without_padding(tensors["scales"].t(), groups)
        products = without_padding(tensors[self.zeros_name].t(), groups)
        return QuantizedWeight(codes, scales, integer_zeros(products, scales, bits), bits)


def _interleave(codes: Tensor) -> Tensor:
    """Codes uint8 `[N, K]` as words int16 `[N / 4, K]`."""
    rows, columns = codes.shape
    # A run of 32 inputs is (round, pair, member); pairs of a kind are brought together.
    runs = codes.reshape(rows, columns // 32, 4, 4, 2).transpose(2, 3)
    # Of each eight (four pairs) the first members go first.
    eights = runs.reshape(rows, columns // 32, 4, 4, 2).transpose(3, 4).reshape(rows, columns)
    strips = eights.reshape(rows // _ROWS, _ROWS, columns // _RUN, _RUN).transpose(1, 2)
    quads = strips.reshape(rows // _ROWS, columns, 4)
    octets = quads[..., 0::2] | (quads[..., 1::2] << 4)
    return octets.contiguous().view(torch.int16).squeeze(-1)


def _separate(words: Tensor) -> Tensor:
    """Undo `_interleave`."""
    quarter, columns = words.shape
    octets = words.contiguous().view(torch.uint8).view(quarter, columns, 2)
    quads = torch.stack((octets & 15, octets >> 4), dim=-1)
    strips = quads.reshape(quarter, columns // _RUN, _ROWS, _RUN).transpose(1, 2)
    rows = quarter * _ROWS
    eights = strips.reshape(rows, columns // 32, 4, 2, 4).transpose(3, 4)
    runs = eights.reshape(rows, columns // 32, 4, 4, 2).transpose(2, 3)
    return runs.reshape(rows, columns)


gemv_fast = Interleaved("qzeros")
llm_awq = Interleaved("scaled_zeros")

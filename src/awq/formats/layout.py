"""What every layout offers, and the arithmetic that several of them share.

A layout is a pair of `pack` and `unpack` around the canonical weight, with the names of its tensors. Codes
and scales always come back as they were. Zero points do too in the layouts that store them as integers;
three families store their product with the scale instead (`zero * scale`, rounded to 16 bits), and
`integer_zeros` says when the integer can be told from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from awq.errors import ConfigError, CorruptFileError
from awq.weight import QuantizedWeight

# Rounding moves the quotient by 15 / 512 at most with 4 bits and bfloat16, the coarsest of the dtypes;
# foreign writers may have rounded twice. What is further from an integer was never one.
_TOLERANCE = 0.25
_EVEN_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Measures of a quantized layer."""

    out_features: int
    in_features: int
    group_size: int


class Layout(Protocol):
    """One way to put a quantized weight on disk."""

    @property
    def names(self) -> tuple[str, ...]:
        """Suffixes of the tensors that stand for a weight. The first one marks a layer of this layout."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Suffixes of tensors that some checkpoints lack."""

    def supports(self, out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
        """Why a layer cannot be held, or None when it can."""

    def packed_shapes(
        self, out_features: int, in_features: int, group_size: int, scales_dtype: torch.dtype, bits: int = 4
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor that stands for a layer's weight, by suffix."""

    def measure(self, shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int) -> LayerShape:
        """The layer's measures, from the shapes of its tensors.

        Args:
            shapes: by suffix.
            bits: width of a code.
            group_size: as the checkpoint's configuration has it (-1: the whole row); some layouts pad their
                scales, so that their shapes do not tell it.

        Raises:
            CorruptFileError: the shapes do not belong together.
        """

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that stand for a weight, by suffix.

        Raises:
            ConfigError: the layout cannot hold the weight.
        """

    def unpack(
        self, tensors: Mapping[str, Tensor], bits: int = 4, group_size: int | None = None
    ) -> QuantizedWeight:
        """The weight behind such tensors.

        Args:
            tensors: by suffix.
            bits: width of a code.
            group_size: see `measure`; needed by the layouts that pad their scales.

        Raises:
            CorruptFileError: the tensors do not belong together, or hold what is no quantized weight.
        """


def divides(in_features: int, group_size: int) -> str | None:
    """Why a row cannot be cut into groups, or None when it can."""
    if group_size < 1 or in_features % group_size:
        return f"{in_features} input channels do not divide into groups of {group_size}"
    return None


def words_both_ways(out_features: int, in_features: int, group_size: int, bits: int) -> str | None:
    """Why a layout that packs codes by inputs and zero points by outputs cannot hold a layer, or None."""
    least = 32 // math.gcd(32, bits)  # fewer codes fill no whole words
    if out_features % least or in_features % least:
        return f"{out_features} outputs of {in_features} inputs do not divide by {least}"
    return divides(in_features, group_size)


def refuse(reason: str | None) -> None:
    """Raise the reason that `supports` gave, if it gave one.

    Raises:
        ConfigError: there is a reason.
    """
    if reason:
        raise ConfigError(reason)


def grouped(out_features: int, in_features: int, groups: int) -> LayerShape:
    """Measures of a layer with this many groups in a row.

    Raises:
        CorruptFileError: the groups do not cover the row.
    """
    if not groups or in_features % groups:
        raise CorruptFileError(f"{groups} groups of scales do not cover {in_features} input channels")
    return LayerShape(out_features, in_features, in_features // groups)


def whole_row(group_size: int | None, in_features: int) -> int:
    """A group size as the configuration has it, with -1 read as the whole row.

    Raises:
        CorruptFileError: the configuration does not tell it, or it does not divide the row.
    """
    if group_size is None:
        raise CorruptFileError("this layout pads its scales: the group size must come from the configuration")
    size = in_features if group_size == -1 else group_size
    reason = divides(in_features, size)
    if reason:
        raise CorruptFileError(reason)
    return size


def pack_nibbles(values: Tensor, even_first: bool = False) -> Tensor:
    """Nibbles uint8 `[..., n]` as words int32 `[..., n / 8]`, the first one in the low bits.

    Args:
        values: each below 16; n divides by 8.
        even_first: a word holds its eight in the order 0, 2, 4, 6, 1, 3, 5, 7.
    """
    eights = values.reshape(*values.shape[:-1], -1, 8)
    if even_first:
        eights = eights[..., list(_EVEN_FIRST)]
    # Two nibbles make a byte, and four little-endian bytes a word: no arithmetic on signed words.
    octets = eights[..., 0::2] | (eights[..., 1::2] << 4)
    return octets.contiguous().view(torch.int32).squeeze(-1)


def unpack_nibbles(words: Tensor, even_first: bool = False) -> Tensor:
    """Undo `pack_nibbles`: words of 32 bits `[..., n]` as nibbles uint8 `[..., 8 * n]`."""
    # Flat first: a column of single words counts as contiguous with any stride, and could not be viewed.
    octets = words.contiguous().view(-1).view(torch.uint8).view(*words.shape, 4)
    eights = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    if even_first:
        eights = eights[..., [_EVEN_FIRST.index(column) for column in range(8)]]
    return eights.flatten(-2)


def exact_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in another dtype, unless that would change one.

    Raises:
        ConfigError: a scale is not representable.
    """
    out = scales.to(dtype)
    if not torch.equal(out.float(), scales.float()):
        raise ConfigError(
            f"a scale is not representable as {str(dtype).removeprefix('torch.')}, which the layout demands"
        )
    return out


def scaled_zeros(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """-zero * scale `[out_features, groups]`, computed in float32, rounded once.

    Raises:
        ConfigError: a product is too large for the dtype.
    """
    out = -(weight.scales.float() * weight.zeros.float())
    rounded = out.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise ConfigError(f"zero * scale is too large for {str(dtype).removeprefix('torch.')}")
    return rounded


def integer_zeros(products: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Zero points uint8 from stored products -zero * scale.

    Rounding the product to 16 bits moves the quotient far less than half a step, so what `scaled_zeros` wrote
    comes back exactly (with 8 bits and bfloat16, zero points above 127 may be refused). Where a scale is 0
    the whole group is 0 whatever its zero point was; it comes back as 0.

    Raises:
        CorruptFileError: a quotient is no integer below 2**bits: the offset belongs to no zero point.
    """
    scale, product = scales.float(), products.float()
    dead = scale == 0
    quotient = -product / torch.where(dead, torch.ones_like(scale), scale)
    zeros = quotient.round()
    wrong = ((quotient - zeros).abs() > _TOLERANCE) | (zeros < 0) | (zeros >= 2**bits)
    wrong |= ~torch.isfinite(quotient) | (dead & (product != 0))
    if bool(wrong.any()):
        row, group = (int(index) for index in wrong.nonzero()[0])
        raise CorruptFileError(
            f"{int(wrong.sum())} groups have an offset that is no zero point of {bits} bits (row {row}, "
            f"group {group}: offset {float(product[row, group]):.6g}, scale {float(scale[row, group]):.6g}); "
            "the weight has no exact form in the other layouts"
        )
    return zeros.to(torch.uint8)

"""Codes of any width one behind another in words of 32 bits, little-endian bit by bit.

MLX, GPTQ and compressed-tensors agree on this, though each describes it in its own way: with 2, 4 and 8 bits
a word holds whole codes, with the others a code may begin in one word and end in the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awq.errors import CorruptFileError
from awq.formats.layout import pack_nibbles, unpack_nibbles


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """Values uint8 `[rows, n]`, each below 2**bits, as words int32 `[rows, n * bits / 32]`."""
    if bits == 4:
        return pack_nibbles(values)
    if bits == 8:
        # Flat first: a row or column of one counts as contiguous with any stride, and could not be viewed.
        return values.contiguous().view(-1).view(torch.int32).view(values.shape[0], -1)
    places = torch.arange(bits, dtype=torch.uint8)
    stream = ((values.unsqueeze(-1) >> places) & 1).reshape(values.shape[0], -1, 8)
    octets = (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32)


def codes_in(words: int, bits: int) -> int:
    """How many codes so many words hold.

    Raises:
        CorruptFileError: they are not full.
    """
    if words * 32 % bits:
        raise CorruptFileError(f"{words} words do not hold a whole number of codes of {bits} bits")
    return words * 32 // bits


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Undo `pack_stream`, for words of 32 bits of any dtype."""
    if bits == 4:
        return unpack_nibbles(words)
    octets = words.contiguous().view(-1).view(torch.uint8).view(words.shape[0], -1)
    if bits == 8:
        return octets
    stream = ((octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).view(words.shape[0], -1, bits)
    return (stream << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)

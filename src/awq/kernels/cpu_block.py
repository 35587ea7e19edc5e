"""A decoder block, or its attention, for one new token of each sequence in one call of C++ (`cpp/block.h`).

Between two products of a token there are a dozen small operators, and the weights have left nothing of Python
and PyTorch in the caches: to call them takes several times what they compute.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awq.errors import KernelError
from awq.kernels.cpu_decoding import Strides, mask_strides
from awq.kernels.cpu_native import KINDS, loaded
from awq.kernels.cpu_product import ACTIVATIONS, Product, ProductStruct, struct_of

# The most channels that a head may have.
LARGEST_HEAD = 512


class Norm(NamedTuple):
    """A root mean square norm: weight `[channels]`, and the rest as in `cpu_decoding.rms_norm`."""

    weight: Tensor
    epsilon: float
    offset: float
    rounds: bool


class Attention(NamedTuple):
    """out(attention(qkv(x))).

    Queries and keys may have norms of their own, over heads or over all channels, and are turned by position.

    `starts` are the channels where queries, keys and values begin in the output of `qkv`. `size` is that of a
    head; `scale` is that of the products of queries and keys.
    """

    query: Norm | None
    keys: Norm | None
    qkv: Product
    out: Product
    starts: tuple[int, int, int]
    heads: int
    groups: int
    size: int
    scale: float


class Around(NamedTuple):
    """What makes attention a block: x + attention(first(x)), and to that, as y,
    down(activation(gate) * up) of second(y).

    `starts` are the channels where gate and up begin in the output of `wide`.
    """

    first: Norm
    second: Norm
    wide: Product
    down: Product
    starts: tuple[int, int]
    activation: str


class _Scaling(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("kind", "rounds")),
        *((name, ctypes.c_float) for name in ("offset", "epsilon")),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, ProductStruct) for name in ("qkv", "out", "wide", "down")),
        *((name, _Scaling) for name in ("first", "second", "query", "keys")),
        *((name, ctypes.c_int64) for name in ("heads", "groups", "size")),
        ("starts", ctypes.c_int64 * 5),
        ("scale", ctypes.c_float),
        ("activation", ctypes.c_int32),
    )


class _Token(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cosines", "sines", "keys", "values", "mask", "result")),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("batch", "length")),
        *((name, ctypes.c_int32) for name in ("kind", "digits")),
    )


class CpuBlock:
    """One block, ready to run. It holds the tensors whose addresses it has.

    Args:
        attention: its attention. Channels, heads and what lies between gate and down divide by
            `cpu_decoding.WIDE`.
        around: the rest of it; None for attention alone.
        dtype: of activations, and of biases.
        digits: bytes of an activation in products; see `cpu_native`.
    """

    def __init__(self, attention: Attention, around: Around | None, dtype: torch.dtype, digits: int) -> None:
        self.attention, self.around, self.dtype, self._digits = attention, around, dtype, digits
        products = [struct_of(each) for each in (attention.qkv, attention.out)]
        norms = [_scaling(each) for each in (attention.query, attention.keys)]
        if around is None:
            products += [ProductStruct(), ProductStruct()]
            norms = [_scaling(None), _scaling(None), *norms]
        else:
            products += [struct_of(each) for each in (around.wide, around.down)]
            norms = [_scaling(around.first), _scaling(around.second), *norms]
        self._block = _Block(
            *products,
            *norms,
            attention.heads,
            attention.groups,
            attention.size,
            (ctypes.c_int64 * 5)(*attention.starts, *(around.starts if around else (0, 0))),
            attention.scale,
            ACTIVATIONS[around.activation] if around else 0,
        )
        self._at = ctypes.addressof(self._block)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies have addresses of their own.
        return CpuBlock, (self.attention, self.around, self.dtype, self._digits)

    def __call__(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The hidden states behind the block, or what attention gives.

        Args:
            x: `[batch, 1, channels]`, contiguous, in the block's dtype.
            rotation: cosines and sines, `[batch or 1, 1, head_dim]` in that dtype, contiguous.
            keys, values: `[batch, groups, length, head_dim]` in that dtype, with strides as they may be, but
                for the last. Their last token is written: it is this one.
            mask: bool `[batch or 1, 1, 1, length or more]`, True where to attend; None for everywhere.

        Returns:
            The shape of x.
        """
        result = torch.empty_like(x)
        cosines, sines = rotation
        strides = Strides(
            cosines.stride(0) if cosines.shape[0] > 1 else 0,
            sines.stride(0) if sines.shape[0] > 1 else 0,
            *keys.stride()[:3],
            *values.stride()[:3],
            *mask_strides(mask),
        )
        token = _Token(
            x.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            None if mask is None else mask.data_ptr(),
            result.data_ptr(),
            strides,
            x.shape[0],
            keys.shape[2],
            KINDS[self.dtype],
            self._digits,
        )
        if loaded().library.openawq_block(self._at, ctypes.addressof(token), torch.get_num_threads()):
            raise KernelError(f"no memory for a block with {x.shape[0]} sequences of {keys.shape[2]} tokens")
        return result


def _scaling(norm: Norm | None) -> _Scaling:
    if norm is None:
        return _Scaling(None, 0, 0, 0, 0.0, 0.0)
    weight = norm.weight
    if not weight.is_contiguous():
        raise KernelError("the weights of a block's norms lie contiguously in memory")
    return _Scaling(
        weight.data_ptr(), weight.numel(), KINDS[weight.dtype], norm.rounds, norm.offset, norm.epsilon
    )

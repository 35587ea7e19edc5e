"""A layer of experts for a few tokens in one call of C++ (`cpp/experts.h`).

A token goes to several experts of three small products each, and between those PyTorch calls a dozen small
operators for each expert, which takes longer than the products.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awq.errors import KernelError
from awq.kernels.cpu_decoding import WIDE
from awq.kernels.cpu_native import KINDS, loaded
from awq.kernels.cpu_product import ACTIVATIONS, Product, ProductStruct, struct_of


class Expert(NamedTuple):
    """down(activation(gate) * up)."""

    gate: Product
    up: Product
    down: Product


class _Expert(ctypes.Structure):
    _fields_ = tuple((name, ProductStruct) for name in Expert._fields)


class _Routed(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "chosen", "shares", "hit", "result")),
        *((name, ctypes.c_int64) for name in ("tokens", "each", "hits")),
        *((name, ctypes.c_int32) for name in ("kind", "share_kind", "digits", "activation")),
    )


class CpuExperts:
    """The experts of one layer, ready to run. It holds the tensors whose addresses it has.

    Args:
        experts: alike in their shapes; hidden and inner channels divide by `cpu_decoding.WIDE`.
        activation: a name in `cpu_product.ACTIVATIONS`.
        dtype: of activations, and of biases.
        digits: bytes of an activation in products; see `cpu_native`.

    Raises:
        KernelError: their shapes do not fit.
    """

    def __init__(self, experts: Sequence[Expert], activation: str, dtype: torch.dtype, digits: int) -> None:
        self.experts, self.activation, self.dtype, self._digits = experts, activation, dtype, digits
        structs = [_Expert(*(struct_of(each) for each in expert)) for expert in experts]
        shapes = {
            tuple((each.columns, each.outputs) for each in (one.gate, one.up, one.down)) for one in structs
        }
        (gate, up, down), *others = shapes
        if others or gate != up or down != gate[::-1] or any(channels % WIDE for channels in gate):
            raise KernelError(f"experts have shapes that do not fit: {sorted(shapes)}")
        self.channels = int(gate[0])
        self._structs = (_Expert * len(structs))(*structs)
        self._at = ctypes.addressof(self._structs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies have addresses of their own.
        return CpuExperts, (self.experts, self.activation, self.dtype, self._digits)

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor, hit: Sequence[int]) -> Tensor:
        """The sum of what the chosen experts give, each times its share, in the order of the experts.

        Args:
            x: `[tokens, channels]`, contiguous, in the layer's dtype.
            chosen: int64 `[tokens, experts of a token]`, contiguous.
            shares: of the same shape, contiguous, float32 or of x's dtype.
            hit: the numbers in `chosen`, ascending; each of an expert there is.

        Returns:
            The shape and dtype of x.
        """
        result = torch.zeros_like(x)
        if not hit:
            return result
        numbers = (ctypes.c_int64 * len(hit))(*hit)
        routed = _Routed(
            x.data_ptr(),
            chosen.data_ptr(),
            shares.data_ptr(),
            ctypes.addressof(numbers),
            result.data_ptr(),
            *chosen.shape,
            len(hit),
            KINDS[self.dtype],
            KINDS[shares.dtype],
            self._digits,
            ACTIVATIONS[self.activation],
        )
        if loaded().library.openawq_experts(self._at, ctypes.addressof(routed), torch.get_num_threads()):
            raise KernelError(f"no memory for experts with {len(x)} tokens")
        return result

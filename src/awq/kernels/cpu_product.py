"""A layer's product as a step of something larger in C++ (`cpp/product.h`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from awq.errors import KernelError
from awq.kernels.cpu_native import KINDS, State

# Activations, as `cpp/gate.h` numbers them.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class Product(NamedTuple):
    """A layer, or several merged: the arrangement of its codes, and its bias `[out]` or None."""

    state: State
    bias: Tensor | None


class ProductStruct(ctypes.Structure):
    """As C++ has it. It holds addresses; whoever has one keeps the tensors."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias")),
        *((name, ctypes.c_int64) for name in ("columns", "outputs", "group")),
        *((name, ctypes.c_int32) for name in ("scale_kind", "planes")),
    )


def struct_of(product: Product) -> ProductStruct:
    """A product for C++.

    Raises:
        KernelError: its tensors lie apart in memory.
    """
    state, bias = product
    groups, outputs = state.scales_by_group.shape
    tensors: Sequence[Tensor] = (state.packed, state.scales_by_group, state.zeros_by_group)
    if not all(each.is_contiguous() for each in tensors) or (bias is not None and not bias.is_contiguous()):
        raise KernelError("codes, scales, zero points and biases must lie contiguously in memory")
    return ProductStruct(
        *(each.data_ptr() for each in tensors),
        None if bias is None else bias.data_ptr(),
        groups * state.group_size,
        outputs,
        state.group_size,
        KINDS[state.scales_by_group.dtype],
        state.planes,
    )

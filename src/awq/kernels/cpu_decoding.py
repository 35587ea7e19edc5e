"""What happens between two products of a decoded token, in C++ (`cpp/norm.h`, `cpp/attention.h`).

PyTorch spends more on calling a handful of small operators than on what they compute; and its attention in
16 bits is slow on processors that do not multiply such numbers. Both are computed in float32 here. A result
depends neither on the number of threads nor on the instruction set.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from awq.errors import KernelError
from awq.kernels.cpu_native import KINDS, loaded

# What both divide their channels by.
WIDE = 16

Strides = ctypes.c_int64 * 10


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0, rounds: bool = True) -> Tensor:
    """x over the root of its mean square, times the weight.

    Args:
        x: `[..., channels]` on the CPU, without gradients; channels divide by `WIDE`.
        weight: `[channels]`.
        epsilon: added to the mean square.
        offset: added to the weight.
        rounds: whether the quotient is rounded to x's dtype before it is multiplied.

    Returns:
        The shape and dtype of x.
    """
    x, weight = x.contiguous(), weight.contiguous()
    channels = x.shape[-1]
    out = torch.empty_like(x)
    loaded().library.openawq_norm(
        x.data_ptr(),
        KINDS[x.dtype],
        x.numel() // channels,
        channels,
        weight.data_ptr(),
        KINDS[weight.dtype],
        offset,
        epsilon,
        rounds,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def attend_refuses(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` does not serve such tensors."""
    return (
        query.shape[2] != 1
        or not query.is_cpu
        or query.dtype not in KINDS
        or not query.dtype == key.dtype == value.dtype
        or query.shape[3] % WIDE != 0
        or key.shape != value.shape
        or key.shape[3] != query.shape[3]
        or query.shape[1] % key.shape[1] != 0
        or query.shape[0] != key.shape[0]
        or key.stride(3) != 1
        or value.stride(3) != 1
        or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        or (mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1))
    )


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    """Of batch and position, for a mask `[batch or 1, 1, 1, length]`."""
    if mask is None:
        return 0, 0
    return mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(3)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one token, for what `attend_refuses` has nothing against.

    Args:
        query: `[batch, heads, 1, head_dim]`.
        key, value: `[batch, fewer heads, length, head_dim]`.
        mask: bool `[batch or 1, 1, 1, length]`, True where to attend; None for everywhere.
        scale: of the products of query and keys.

    Returns:
        `[batch, 1, heads, head_dim]`; zeros where the mask leaves nothing.
    """
    batch, heads, _, size = query.shape
    _, groups, length, _ = key.shape
    if query.stride(3) != 1:
        query = query.contiguous()
    out = query.new_empty(batch, 1, heads, size)
    failed = loaded().library.openawq_attend(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        KINDS[query.dtype],
        None if mask is None else mask.data_ptr(),
        Strides(*query.stride()[:2], *key.stride()[:3], *value.stride()[:3], *mask_strides(mask)),
        batch,
        heads,
        heads // groups,
        length,
        size,
        scale,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise KernelError(f"no memory for the attention of {batch} x {heads} heads to {length} tokens")
    return out

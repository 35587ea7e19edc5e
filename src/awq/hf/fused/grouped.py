"""Attention of one new token over a static cache, without a copy of the cache.

Where several query heads share one head of keys and values, and there is a mask, as there is with a static
cache, transformers repeats keys and values for every head, since most of PyTorch's attention kernels want it
so: each token then copies the whole cache. cuDNN's kernel, which PyTorch takes on Hopper and newer, reads it
as it is. What is here chooses between the two; the attention itself is PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from awq.hf.fused import attention

# What the attention is called in transformers' registry.
NAME = "sdpa_grouped"


def use_grouped(model: Any, length: int) -> bool:
    """Let a model on a GPU attend this way to a static cache of `length` tokens, if it gains by it.

    Returns:
        Whether it does so now. If not, the model is as it was.
    """
    if not _gains(model, length):
        return False
    attention.use(model, NAME, attend)
    return True


def undo_grouped(model: Any) -> None:
    """Undo `use_grouped`."""
    attention.undo(model, NAME)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`.

    Args:
        query: `[batch, heads, tokens, head_dim]`.
        key, value: `[batch, fewer heads, length, head_dim]`.
        attention_mask: `[batch, 1, tokens, length]` or None.

    Returns:
        `[batch, tokens, heads, head_dim]`, and no weights.
    """
    if query.shape[2] > 1 or attention_mask is None or dropout or kwargs.get("position_bias") is not None:
        return attention.plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def _gains(model: Any, length: int) -> bool:
    """Whether PyTorch would take cuDNN's kernel for a new token of this model."""
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    fewer = getattr(config, "num_key_value_heads", None)
    if model.device.type != "cuda" or not attention.is_plain(model) or not heads or not fewer:
        return False
    if heads == fewer:
        return False
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    query = torch.empty(1, heads, 1, size, dtype=model.dtype, device=model.device)
    cache = query.new_empty(1, fewer, length, size)
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=model.device)
    choice = torch._fused_sdp_choice(query, cache, cache, mask, enable_gqa=True)
    return bool(choice == SDPBackend.CUDNN_ATTENTION.value)

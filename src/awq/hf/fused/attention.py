"""Attention of our own under a name in transformers' registry, for one token; transformers' for the rest.

On a CPU it is `awq.kernels.cpu_decoding.attend`, which reads keys and values once for all query heads that
share them, and computes in float32. PyTorch's is several times slower without AVX512, above all in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from awq.kernels.cpu_decoding import attend as attend_natively
from awq.kernels.cpu_decoding import attend_refuses

# What the attention is called in transformers' registry.
NAME = "sdpa_native"
# Arguments that change what is computed.
_CHANGING = ("position_bias", "cache", "softcap")


def use(model: Any, name: str, attend: Callable[..., tuple[Tensor, None]]) -> None:
    """Let a model that attends by `sdpa` attend by a function of ours, under a name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def undo(model: Any, name: str) -> None:
    """Undo `use`."""
    if model.config._attn_implementation == name:
        model.set_attn_implementation("sdpa")


def is_plain(model: Any) -> bool:
    """Whether a model attends by `sdpa` in all its parts."""
    config = model.config
    return config._attn_implementation == "sdpa" and config.get_text_config(decoder=True) is config


def pays() -> bool:
    """Whether ours is the faster one on this processor: with AVX512 PyTorch's is (docs/speed.md)."""
    return not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def plain(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' `sdpa`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    return found


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
    if (
        dropout
        or torch.compiler.is_compiling()
        or any(kwargs.get(name) is not None for name in _CHANGING)
        or attend_refuses(query, key, value, attention_mask)
    ):
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_natively(query, key, value, attention_mask, scale), None

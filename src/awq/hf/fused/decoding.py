"""Whole decoder blocks in one call for a new token, for a model on a CPU, if `block_proof` proves them.

Of other blocks it is the attention alone, if `attention_proof` proves that. Prompts, gradients, other caches,
and whatever a hook or an adapter was put on since, are the module's as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache, StaticLayer

from awq.hf.fused import attention_proof, block_proof
from awq.hf.fused.attention import NAME, pays
from awq.hf.fused.parts import Parts
from awq.hf.fused.room import place_for_one, tokens_of
from awq.kernels.cpu_block import CpuBlock

# With AVX512, PyTorch's attention to more tokens than this is so much faster that calling its parts pays.
_FAR = 1024


class _Native:
    """Stands in for the `forward` of a module that attends.

    Args:
        module: the module.
        attention: the one in it that has an index in the cache.
        call: what does for it.
        parts: what must stay as it is.
    """

    def __init__(self, module: nn.Module, attention: Any, call: CpuBlock, parts: Parts) -> None:
        self.module, self.attention, self.call, self.parts = module, attention, call, parts

    def _result(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """What the module would give, or None where ours does not serve."""
        rotation, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        layer = self._layer(kwargs.get("past_key_values"), x.shape[0])
        held = tokens_of(layer)
        if (
            held is None
            or not isinstance(rotation, tuple)
            or not self._serves(x, rotation, held + 1)
            or not _fits(mask, layer, held + 1)
            or not self._is_as_proved()
        ):
            return None
        keys, values = place_for_one(layer, held)
        return self.call(x, rotation, keys, values, mask)

    def _layer(self, cache: Any, batch: int) -> Any:
        """This block's part of the cache, if it is one of ours or a static one, for as many sequences."""
        if type(cache) not in (DynamicCache, StaticCache) or cache.offloading or torch.is_grad_enabled():
            return None
        index, parts = self.attention.layer_idx, self.call.attention
        layer: Any = cache.layers[index] if index < len(cache.layers) else None
        if not getattr(layer, "is_initialized", False):
            return None
        for held in (layer.keys, layer.values):
            shape = (batch, parts.groups, layer.keys.shape[2], parts.size)
            if held.shape != shape or held.dtype is not self.call.dtype or held.stride(3) != 1:
                return None
        return layer

    def _serves(self, x: Tensor, rotation: tuple[Tensor, Tensor], length: int) -> bool:
        dtype, (cosines, sines) = self.call.dtype, rotation
        return (
            x.dtype is cosines.dtype is sines.dtype is dtype
            and x.shape[1] == 1
            and x.is_cpu
            and x.is_contiguous()
            and cosines.shape == sines.shape == (len(cosines), 1, self.call.attention.size)
            and len(cosines) in (1, len(x))
            and cosines.is_contiguous()
            and sines.is_contiguous()
            and (length <= _FAR or pays())
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    def _is_as_proved(self) -> bool:
        used = self.attention.config._attn_implementation
        return not self.module.training and used in ("sdpa", NAME) and self.parts.are_as_they_were()


class NativeBlock(_Native):
    """Stands in for the `forward` of one decoder block."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module, which takes over where ours does not serve."""
        out = None if args else self._result(hidden_states, kwargs)
        return type(self.module).forward(self.module, hidden_states, *args, **kwargs) if out is None else out


class NativeAttention(_Native):
    """Stands in for the `forward` of attention in other blocks."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module, which takes over where ours does not serve."""
        out = None if args else self._result(hidden_states, kwargs)
        if out is None:
            return type(self.module).forward(self.module, hidden_states, *args, **kwargs)
        return out, None


def _fits(mask: Tensor | None, layer: Any, length: int) -> bool:
    """Whether a mask is over the tokens of a cache; those of a static one are over all its room."""
    batch, _, room, _ = layer.keys.shape
    if mask is None:
        return type(layer) is not StaticLayer
    covered = room if type(layer) is StaticLayer else length
    return mask.dtype is torch.bool and len(mask) in (1, batch) and mask.shape[1:] == (1, 1, covered)


def use_native_blocks(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Replace the `forward` of blocks that are proved to be such, elsewhere of attention; returns names."""
    found: list[str] = []
    for make in (native_block, native_attention):
        for name, module in model.named_modules():
            native = None if name.startswith(tuple(f"{block}." for block in found)) else make(module, dtype)
            if native is not None:
                module.forward = native
                found.append(name)
    return found


def undo_native_blocks(model: nn.Module) -> None:
    """Undo `use_native_blocks`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Native):
            del module.forward


def native_block(module: nn.Module, dtype: torch.dtype) -> NativeBlock | None:
    """What does for a module if it is proved to be a block that can be replaced, or None."""
    found = block_proof.pieces_of(module, dtype)
    proved = None if found is None else block_proof.proved(found)
    if found is None or proved is None:
        return None
    attention = found.attention
    call = CpuBlock(*proved, dtype, attention.kernel.digits(dtype))
    return NativeBlock(module, attention.module, call, Parts((module, attention.module, found.feed_forward)))


def native_attention(module: nn.Module, dtype: torch.dtype) -> NativeAttention | None:
    """What does for a module if it is proved to be attention that can be replaced, or None."""
    found = attention_proof.pieces_of(module, dtype)
    proved = None if found is None else attention_proof.proved(found)
    if found is None or proved is None:
        return None
    call = CpuBlock(proved, None, dtype, found.kernel.digits(dtype))
    return NativeAttention(module, module, call, Parts((module,)))

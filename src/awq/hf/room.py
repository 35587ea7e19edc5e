"""A key/value cache that grows with room to spare, for a model on a CPU.

transformers' growing cache is copied whole for each token. One of ours, which takes the place of its layers
before the first token, writes a token behind those before it, and is copied when its room is used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer

# Tokens by which the room grows at least; memory that was never written to is not taken.
_STEP = 256


class RoomyLayer(DynamicLayer):
    """As `DynamicLayer`: `keys` and `values` are the first tokens of larger tensors."""

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; see there."""
        if not key_states.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
            out: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return out
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        self.make_longer(key_states.shape, value_states.shape)
        self.keys[..., -tokens:, :] = key_states
        self.values[..., -tokens:, :] = value_states
        return self.keys, self.values

    def make_longer(self, keys: Sequence[int], values: Sequence[int]) -> None:
        """Let keys and values have as many tokens more as these shapes have, which the caller writes.

        Args:
            keys, values: `[batch, heads, tokens, head_dim]` of what is to be added.
        """
        self.keys = self._longer("keys", self.keys, keys)
        self.values = self._longer("values", self.values, values)

    def _longer(self, name: str, held: Tensor, shape: Sequence[int]) -> Tensor:
        *lead, tokens, channels = shape
        before = held.shape[-2] if held.numel() else 0
        length = before + tokens
        room = self._rooms.get(name)
        if room is None or not _begins(room, held) or length > room.shape[-2] or _is_closed(room):
            most = -(-(length + length // 4 + 1) // _STEP) * _STEP
            room = held.new_empty(*lead, most, channels)
            if before:
                room[..., :before, :] = held
            self._rooms[name] = room
        return room.narrow(-2, 0, length)


def tokens_of(layer: Any) -> int | None:
    """How many tokens a layer of a cache holds; None if `place_for_one` has none in it for one more."""
    if type(layer) is RoomyLayer and layer.is_initialized:
        return int(layer.keys.shape[-2])
    if type(layer) is StaticLayer and layer.is_initialized:
        held = int(layer.cumulative_length)
        return held if held < layer.max_cache_len else None
    return None


def place_for_one(layer: Any, held: int) -> tuple[Tensor, Tensor]:
    """Keys and values with one token more than a layer holds, the last one for the caller to write.

    Args:
        layer: one of which `tokens_of` knows.
        held: what that said.
    """
    if type(layer) is StaticLayer:
        layer.cumulative_length.add_(1)
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None  # it is initialized
        return keys.narrow(-2, 0, held + 1), values.narrow(-2, 0, held + 1)
    one = slice(-1, None)
    layer.make_longer(layer.keys[..., one, :].shape, layer.values[..., one, :].shape)
    return layer.keys, layer.values


def _begins(room: Tensor, held: Tensor) -> bool:
    """Whether a tensor is the first tokens of a room. Reordered or cut caches are other tensors."""
    return (
        held.data_ptr() == room.data_ptr()
        and held.stride() == room.stride()
        and held.shape[:-2] == room.shape[:-2]
    )


def _is_closed(room: Tensor) -> bool:
    """Whether PyTorch does not let it be written to here."""
    return room.is_inference() and not torch.is_inference_mode_enabled()


class GiveRoom:
    """A hook that sees a model's arguments, and gives a cache that is still empty layers with room."""

    def __init__(self, model: nn.Module) -> None:
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Exchange layers of the cache that are exactly transformers'."""
        cache: Any = kwargs.get("past_key_values")
        if type(cache) is not DynamicCache:
            return
        for index, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and not layer.is_initialized:
                cache.layers[index] = RoomyLayer()
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = RoomyLayer


def give_room(model: nn.Module) -> None:
    """Let a model's caches grow with room to spare."""
    GiveRoom(model)


def undo_give_room(model: nn.Module) -> None:
    """Undo `give_room`."""
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(hook, GiveRoom):
            hook.handle.remove()

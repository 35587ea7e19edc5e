"""A key/value cache that grows with room to spare, for a model on a CPU.

transformers' growing cache is copied whole for each token. One of ours, which takes the place of its layers
before the first token, writes a token behind those before it, and is copied when its room is used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

# Tokens by which the room grows at least; memory that was never written to is not taken.
_STEP = 256


class _Rooms:
    """Larger tensors of which a layer's keys and values are a part."""

    def __init__(self) -> None:
        self._rooms: dict[str, Tensor] = {}

    def longer(self, name: str, held: Tensor, shape: Sequence[int]) -> Tensor:
        """What is held with as many tokens more as a shape `[batch, heads, tokens, head_dim]` has, unwritten.

        The same memory where there is room, else a copy in a larger room.
        """
        *lead, tokens, channels = shape
        before = held.shape[-2] if held.numel() else 0
        length = before + tokens
        room = self._rooms.get(name)
        start = None if room is None or _is_closed(room) else _start_in(room, held)
        if room is None or start is None or start + length > room.shape[-2]:
            most = -(-(length + length // 4 + 1) // _STEP) * _STEP
            room, start = held.new_empty(*lead, most, channels), 0
            if before:
                room[..., :before, :] = held
            self._rooms[name] = room
        return room.narrow(-2, start, length)


class RoomyLayer(DynamicLayer):
    """As `DynamicLayer`: `keys` and `values` are the first tokens of larger tensors."""

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._rooms = _Rooms()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; see there."""
        if not _may_be_written(key_states):
            out: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return out
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return _written(self._make_longer(key_states.shape, value_states.shape), key_states, value_states)

    @property
    def moves(self) -> bool:
        """Whether `place_for_one` can be asked."""
        return self.is_initialized

    def place_for_one(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the next token attends to, itself last, for the caller to write."""
        return self._make_longer(self.keys[..., -1:, :].shape, self.values[..., -1:, :].shape)

    def _make_longer(self, keys: Sequence[int], values: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.keys = self._rooms.longer("keys", self.keys, keys)
        self.values = self._rooms.longer("values", self.values, values)
        return self.keys, self.values


class RoomyWindowLayer(DynamicSlidingWindowLayer):
    """As `DynamicSlidingWindowLayer`: for single tokens, its window moves through larger tensors."""

    keys: Any
    values: Any

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self._rooms = _Rooms()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; see there."""
        if not _may_be_written(key_states) or key_states.shape[-2] != 1 or not self.moves:
            out: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return out
        return _written(self.place_for_one(), key_states, value_states)

    @property
    def moves(self) -> bool:
        """Whether `place_for_one` can be asked."""
        return self.is_initialized and not self.record_past and self.sliding_window > 1

    def place_for_one(self) -> tuple[Tensor, Tensor]:
        """Keys and values that the next token attends to, itself last, for the caller to write."""
        keys = self._rooms.longer("keys", self.keys, self.keys[..., -1:, :].shape)
        values = self._rooms.longer("values", self.values, self.values[..., -1:, :].shape)
        first = max(0, keys.shape[-2] - self.sliding_window + 1)
        self.keys, self.values = keys[..., first:, :], values[..., first:, :]
        self.cumulative_length += 1
        return keys, values


_ROOMY = (RoomyLayer, RoomyWindowLayer)


def tokens_of(layer: Any) -> int | None:
    """How many tokens a layer of a cache holds; None if `place_for_one` has none in it for one more."""
    if type(layer) in _ROOMY and layer.moves:
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
    if type(layer) is not StaticLayer:
        places: tuple[Tensor, Tensor] = layer.place_for_one()
        return places
    layer.cumulative_length.add_(1)
    keys, values = layer.keys, layer.values
    assert keys is not None and values is not None  # it is initialized
    return keys.narrow(-2, 0, held + 1), values.narrow(-2, 0, held + 1)


def _may_be_written(states: Tensor) -> bool:
    """Whether what is held may change in place when these are added."""
    return states.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _written(places: tuple[Tensor, Tensor], *states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of which the last tokens are these now."""
    for place, new in zip(places, states, strict=True):
        place[..., -new.shape[-2] :, :] = new
    return places


def _start_in(room: Tensor, held: Tensor) -> int | None:
    """At which token of a room a tensor begins; None where it is no part of it, as reordered ones are not."""
    if (
        held.untyped_storage().data_ptr() != room.untyped_storage().data_ptr()
        or held.stride() != room.stride()
        or held.shape[:-2] != room.shape[:-2]
    ):
        return None
    start, rest = divmod(int(held.storage_offset() - room.storage_offset()), room.stride(-2))
    return start if rest == 0 and 0 <= start < room.shape[-2] else None


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
            if layer.is_initialized:
                continue
            if type(layer) is DynamicLayer:
                cache.layers[index] = RoomyLayer()
            elif type(layer) is DynamicSlidingWindowLayer and not layer.record_past:
                cache.layers[index] = RoomyWindowLayer(layer.sliding_window)
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

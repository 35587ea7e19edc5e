"""A cache that grows with room to spare holds what transformers' holds, whatever is done to it."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from awq.hf.fused.room import (
    RoomyLayer,
    RoomyWindowLayer,
    give_room,
    place_for_one,
    tokens_of,
    undo_give_room,
)

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 2, 7, 300])),
        st.tuples(st.just("crop"), st.integers(0, 3)),
        st.tuples(st.just("reorder"), st.integers(0, 3)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.just(0)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=12,
)


def is_full(layer: Any) -> bool:
    """Whether a layer holds a whole window, of which nothing can be taken off."""
    return layer.is_sliding and layer.get_seq_length() >= layer.sliding_window


def act(layer: Any, step: str, amount: int, generator: torch.Generator) -> Any:
    """Do something to a layer; the layer to go on with."""
    batch = layer.keys.shape[0] if layer.is_initialized and layer.keys.numel() else 2
    if step == "update":
        new = [torch.randn(batch, 3, amount, 4, generator=generator) for _ in range(2)]
        layer.update(*new)
    elif step == "crop" and layer.get_seq_length() > amount and not is_full(layer):
        layer.crop(-amount)
    elif step == "reorder":
        layer.reorder_cache(torch.arange(batch).roll(amount))
    elif step == "repeat" and batch < 8:
        layer.batch_repeat_interleave(amount)
    elif step == "select":
        layer.batch_select_indices(torch.tensor([batch - 1]))
    elif step == "copy":
        return copy.deepcopy(layer)
    elif step == "reset":
        layer.reset()
    return layer


@settings(max_examples=250, deadline=None)
@given(steps=STEPS, inference=st.booleans(), window=st.sampled_from([None, None, 1, 2, 5, 300]))
def test_it_holds_what_transformers_holds(
    steps: list[tuple[str, int]], inference: bool, window: int | None
) -> None:
    layers: list[Any] = [RoomyLayer(), DynamicLayer()]
    if window is not None:
        layers = [RoomyWindowLayer(window), DynamicSlidingWindowLayer(window)]
    with torch.inference_mode(inference), torch.no_grad():
        for number, (step, amount) in enumerate(steps):
            layers = [act(each, step, amount, torch.Generator().manual_seed(number)) for each in layers]
            assert layers[0].get_seq_length() == layers[1].get_seq_length()
            if layers[1].get_seq_length():
                assert torch.equal(layers[0].keys, layers[1].keys)
                assert torch.equal(layers[0].values, layers[1].values)


@torch.no_grad()
def test_tokens_are_added_in_place_until_the_room_is_used_up() -> None:
    layer, places = RoomyLayer(), []
    for _ in range(400):
        keys, _ = layer.update(*torch.randn(2, 1, 2, 1, 8))
        places.append(keys.data_ptr())
    moves = sum(one != other for one, other in itertools.pairwise(places))
    assert 1 <= moves <= 3
    assert layer.keys.untyped_storage().nbytes() < 2 * 400 * 2 * 8 * 4


@torch.no_grad()
def test_a_window_moves_through_its_room() -> None:
    """Each token gets what transformers gives it, and few of them cost a copy."""
    layer, plain, places = RoomyWindowLayer(50), DynamicSlidingWindowLayer(50), []
    for tokens in (7, *[1] * 400):
        new = torch.randn(2, 1, 2, tokens, 8)
        got, expected = layer.update(*new), plain.update(*new)
        assert all(map(torch.equal, got, expected))
        assert layer.get_mask_sizes(1) == plain.get_mask_sizes(1)
        places.append(layer.keys.untyped_storage().data_ptr())
    assert 1 <= sum(one != other for one, other in itertools.pairwise(places)) <= 5


@torch.no_grad()
def test_a_place_for_one_in_a_window_is_where_its_token_belongs() -> None:
    layer, plain = RoomyWindowLayer(4), DynamicSlidingWindowLayer(4)
    for one in (layer, plain):
        one.update(*torch.ones(2, 1, 2, 3, 8))
    for number in range(2, 7):
        assert tokens_of(layer) == 3
        for place in place_for_one(layer, 3):
            place[..., -1, :] = number
        plain.update(*torch.full((2, 1, 2, 1, 8), float(number)))
        assert torch.equal(layer.keys, plain.keys)
        assert torch.equal(layer.values, plain.values)
        assert layer.get_seq_length() == plain.get_seq_length()


def test_a_window_whose_past_is_recorded_has_no_place() -> None:
    layer = RoomyWindowLayer(4)
    assert tokens_of(layer) is None
    layer.update(*torch.ones(2, 1, 2, 3, 8))
    assert tokens_of(layer) == 3
    layer.activate_past_recording()
    assert tokens_of(layer) is None


def test_a_copy_goes_on_by_itself() -> None:
    layer = RoomyLayer()
    with torch.no_grad():
        layer.update(*torch.randn(2, 1, 2, 5, 8))
        twin = copy.deepcopy(layer)
        layer.update(*torch.zeros(2, 1, 2, 1, 8))
        twin.update(*torch.ones(2, 1, 2, 1, 8))
    assert (layer.keys[..., -1, :] == 0).all()
    assert (twin.keys[..., -1, :] == 1).all()
    assert torch.equal(layer.keys[..., :-1, :], twin.keys[..., :-1, :])


def test_what_inference_mode_made_can_be_gone_on_with_outside_of_it() -> None:
    layer = RoomyLayer()
    with torch.inference_mode():
        layer.update(*torch.ones(2, 1, 2, 5, 8))
    with torch.no_grad():
        keys, _ = layer.update(*torch.zeros(2, 1, 2, 1, 8))
    assert keys.sum() == 5 * 2 * 8


def test_gradients_flow_as_through_transformers_own() -> None:
    layer = RoomyLayer()
    new = torch.randn(2, 1, 2, 5, 8, requires_grad=True)
    keys, values = layer.update(*new)
    keys, values = layer.update(*new)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(new.grad, torch.full_like(new, 2))


class Caller(nn.Module):
    def forward(self, past_key_values: Any = None) -> Any:
        return past_key_values


def test_only_empty_layers_of_transformers_own_kind_are_given_room() -> None:
    model = Caller()
    give_room(model)
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4), DynamicLayer()]
    cache.layers[2].update(*torch.randn(2, 1, 2, 5, 8))
    found = [type(each) for each in model(past_key_values=cache).layers]
    assert found == [RoomyLayer, RoomyWindowLayer, DynamicLayer]
    assert cache.layers[1].sliding_window == 4
    assert cache.layer_class_to_replicate is RoomyLayer
    assert model(past_key_values=None) is None
    undo_give_room(model)
    assert model(past_key_values=DynamicCache()).layer_class_to_replicate is DynamicLayer

"""Decoder blocks that one call of C++ can do for, found by proof, not by name.

Such a block is a module that holds two norms, four layers around attention and three around a gate, as
`awq.kernels.cpu_block.BlockParts` puts them together. Which is which is tried out: on random hidden states,
with random rotations of several sizes, the module and ours must agree, in float32 and in the model's dtype,
and put the same into the cache. Positions are far from each other in that, so that a module for which more
depends on them is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from awq.errors import KernelError
from awq.hf.gates import Rule as GateRule
from awq.hf.gates import rule_of as gate_rule_of
from awq.hf.norms import rule_of as norm_rule_of
from awq.hf.room import RoomyLayer
from awq.kernels.cpu_block import LARGEST_HEAD, BlockParts, CpuBlock, Norm
from awq.kernels.cpu_decoding import WIDE
from awq.kernels.cpu_native import KINDS, CpuNative
from awq.kernels.cpu_product import Product
from awq.nn import QuantLinear

# Sizes of random rotations: with the first attention is nearly even, with the last all goes to one token.
_TURNS = (1.0, 6.0, 30.0)
_CLOSE = 2e-3
# Tokens ahead of the one that is compared, and how far apart their positions are.
_LENGTH = 5
_APART = 100_003


class Pieces(NamedTuple):
    """The modules that make up a block."""

    block: Any
    norms: list[Norm]
    attention: Any
    merged: tuple[QuantLinear, ...]
    out: QuantLinear
    head_norms: list[Norm]
    feed_forward: Any
    gate: GateRule
    kernel: CpuNative
    dtype: torch.dtype


def pieces_of(module: nn.Module, dtype: torch.dtype) -> Pieces | None:
    """The modules that make up a block, if a module is built like one."""
    children = dict(module.named_children())
    if len(children) != 4 or module._parameters or "forward" in module.__dict__ or dtype not in KINDS:
        return None
    norms, others = _norms_among(children, dtype)
    if len(norms) != 2:
        return None
    gates = {name: rule for name, child in others.items() if (rule := gate_rule_of(child, dtype)) is not None}
    if len(gates) != 1:
        return None
    ((mlp, gate),) = gates.items()
    attention: Any = next(child for name, child in others.items() if name != mlp)
    inside = dict(attention.named_children())
    layers = [child for child in inside.values() if isinstance(child, QuantLinear)]
    head_norms, rest = _norms_among(
        {name: child for name, child in inside.items() if child not in layers}, dtype
    )
    merged = next((each._merge.members for each in layers if each._merge is not None), ())
    apart = [each for each in layers if each not in merged]
    feed_forward: Any = others[mlp]
    gate_layer, up_layer = (feed_forward.get_submodule(name) for name in (gate.gate, gate.up))
    if len(layers) != 4 or len(merged) != 3 or len(apart) != 1 or rest or len(head_norms) not in (0, 2):
        return None
    if gate_layer._merge is None or {*gate_layer._merge.members} != {gate_layer, up_layer}:
        return None
    if attention._parameters or not all(
        isinstance(getattr(attention, name, None), kind)
        for name, kind in (("head_dim", int), ("scaling", float), ("layer_idx", int))
    ):
        return None
    layers += [child for child in feed_forward.children() if isinstance(child, QuantLinear)]
    kernels = {each._choice.kernel for each in layers if each._choice is not None}
    if len(kernels) != 1 or not isinstance(kernel := kernels.pop(), CpuNative):
        return None
    return Pieces(module, norms, attention, merged, apart[0], head_norms, feed_forward, gate, kernel, dtype)


@torch.no_grad()
def proved_parts(found: Pieces) -> BlockParts | None:
    """How the pieces go together, if ours then does what the module does."""
    for parts in _candidates(found):
        try:
            if all(_agrees(found, parts, each) for each in {torch.float32, found.dtype}):
                return parts
        except (KernelError, RuntimeError, TypeError, ValueError, AttributeError):
            continue  # a module that takes something else
    return None


def _norms_among(
    children: dict[str, nn.Module], dtype: torch.dtype
) -> tuple[list[Norm], dict[str, nn.Module]]:
    """Children that are norms, and the others."""
    norms, others = [], {}
    for name, child in children.items():
        rule = norm_rule_of(child, dtype)
        if rule is None:
            others[name] = child
        else:
            weight = child.get_parameter("weight").detach()
            norms.append(Norm(weight, rule.epsilon, rule.offset, rule.rounds))
    return norms, others


def _candidates(found: Pieces) -> Iterator[BlockParts]:
    """All ways to put the pieces together that fit."""
    size = found.attention.head_dim
    head_norms: list[Any] = found.head_norms or [None, None]
    members = found.feed_forward._modules
    gate, up = (members[name] for name in (found.gate.gate, found.gate.up))
    if size % WIDE or size > LARGEST_HEAD or found.out.out_features % WIDE:
        return
    together = (found.merged, (found.out,), gate._merge.members, (members[found.gate.down],))
    qkv, out, wide, down = (_joined(layers, found.dtype) for layers in together)
    for query, keys, values in itertools.permutations(found.merged):
        if keys.out_features != values.out_features or query.out_features != found.out.in_features:
            continue
        if query.out_features % size or keys.out_features % size or query.out_features % keys.out_features:
            continue
        for (first, second), (of_query, of_keys) in itertools.product(
            itertools.permutations(found.norms), itertools.permutations(head_norms)
        ):
            if of_query is not None and not (
                query.out_features % of_query.weight.numel()
                == 0
                == keys.out_features % of_keys.weight.numel()
            ):
                continue
            yield BlockParts(
                first,
                second,
                of_query,
                of_keys,
                qkv,
                out,
                wide,
                down,
                tuple(each._rows.start for each in (query, keys, values, gate, up)),
                query.out_features // size,
                keys.out_features // size,
                size,
                found.attention.scaling,
                found.gate.activation,
            )


def _joined(layers: tuple[QuantLinear, ...], dtype: torch.dtype) -> Product:
    """The product of layers that are multiplied at once, in that order."""
    state: Any = layers[0]._state
    if all(layer.bias is None for layer in layers):
        return Product(state, None)
    biases = [
        torch.zeros(layer.out_features, dtype=dtype) if layer.bias is None else layer.bias.to(dtype)
        for layer in layers
    ]
    return Product(state, torch.cat(biases))


def _agrees(found: Pieces, parts: BlockParts, dtype: torch.dtype) -> bool:
    """Whether ours gives what the module gives, and puts the same into the cache, for random inputs."""
    generator = torch.Generator().manual_seed(0)
    block = CpuBlock(_in(parts, dtype), dtype, found.kernel.digits(dtype))
    exact = dtype is torch.float32
    close = _CLOSE if exact else max(_CLOSE, 4 * torch.finfo(dtype).eps)
    masks = torch.ones(2, 1, 1, _LENGTH + 1, dtype=torch.bool)
    masks[1, ..., :2] = False

    def drawn(channels: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(2, _LENGTH + 1, channels, generator=generator)).to(dtype)

    for turn, mask in itertools.product(_TURNS if exact else _TURNS[:1], (None, masks)):
        x = drawn(found.out.out_features)
        rotation = drawn(parts.size, turn), drawn(parts.size, turn)
        cache = DynamicCache()
        cache.layer_class_to_replicate = RoomyLayer
        causal = torch.ones(2, 1, _LENGTH, _LENGTH, dtype=torch.bool).tril()
        _run(found.block, cache, slice(_LENGTH), x, rotation, causal)
        layer: Any = cache.layers[found.attention.layer_idx]
        ours = F.pad(layer.keys, (0, 0, 0, 1)), F.pad(layer.values, (0, 0, 0, 1))
        expected = _run(found.block, cache, slice(_LENGTH, None), x, rotation, mask)
        last = x[:, -1:].contiguous()
        cosines, sines = (each[:, -1:].contiguous() for each in rotation)
        got = block(last, (cosines, sines), *ours, mask)
        added = expected - last
        theirs = layer.keys, layer.values
        pairs = [(got - last, added, added if exact else expected), *zip(ours, theirs, theirs, strict=True)]
        if any(float((one - other).norm()) > close * float(size.norm()) for one, other, size in pairs):
            return False
    return True


def _run(
    block: Any, cache: Any, tokens: slice, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """A block on some of the tokens, as a model calls it, at positions far from each other."""
    out = type(block).forward(
        block,
        x[:, tokens],
        attention_mask=mask,
        position_ids=(_APART * torch.arange(x.shape[1])[tokens]).expand(len(x), -1),
        past_key_values=cache,
        use_cache=True,
        position_embeddings=tuple(each[:, tokens] for each in rotation),
    )
    if not isinstance(out, Tensor):
        raise TypeError(f"{type(block).__name__} gives no tensor")
    return out


def _in(parts: BlockParts, dtype: torch.dtype) -> BlockParts:
    """The same with biases in another dtype."""
    converted = {
        name: product._replace(bias=None if product.bias is None else product.bias.to(dtype))
        for name in ("qkv", "out", "wide", "down")
        for product in [getattr(parts, name)]
    }
    return parts._replace(**converted)

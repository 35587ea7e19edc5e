"""Attention that one call of C++ can do for, found by proof, not by name.

It is a module that holds four layers, of which three read the same, or two, of which one gives queries, keys
and values; and maybe a norm each for queries and keys. Which is which is tried out: on random hidden states,
with random rotations of several sizes, the module and ours must agree, in float32 and in the model's dtype,
and put the same into the cache. Positions are far from each other in that, so that a module for which more
depends on them is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from awq.errors import KernelError
from awq.hf.fused.norms import rule_of
from awq.hf.fused.room import RoomyLayer
from awq.kernels.cpu_block import LARGEST_HEAD, Attention, CpuBlock, Norm
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
# What a module that takes something else raises, or a kernel that does not serve it.
REFUSALS = (KernelError, RuntimeError, TypeError, ValueError, AttributeError)
# Runs a module on hidden states `[batch, tokens, channels]`, with what transformers passes beside them.
Run = Callable[..., Any]


class Pieces(NamedTuple):
    """The modules that make up attention; `merged` are the layers of queries, keys and values, or the one."""

    module: Any
    merged: tuple[QuantLinear, ...]
    out: QuantLinear
    norms: list[Norm]
    kernel: CpuNative
    dtype: torch.dtype


def pieces_of(module: Any, dtype: torch.dtype) -> Pieces | None:
    """The modules that make up attention, if a module is built like it."""
    inside = dict(module.named_children())
    layers = [child for child in inside.values() if isinstance(child, QuantLinear)]
    if module._parameters or "forward" in module.__dict__ or dtype not in KINDS:
        return None
    norms, rest = norms_among({name: child for name, child in inside.items() if child not in layers}, dtype)
    merged = next((each._merge.members for each in layers if each._merge is not None), ())
    if len(layers) == 2:  # the first of them gives queries, keys and values
        merged = (max(layers, key=lambda layer: layer.out_features),)
    apart = [each for each in layers if each not in merged]
    if (
        (len(layers), len(merged)) not in ((4, 3), (2, 1))
        or len(apart) != 1
        or rest
        or len(norms) not in (0, 2)
    ):
        return None
    kernel = kernel_of(layers)
    if kernel is None or apart[0].out_features != merged[0].in_features:
        return None
    if not all(
        isinstance(getattr(module, name, None), kind)
        for name, kind in (("head_dim", int), ("scaling", float), ("layer_idx", int))
    ):
        return None
    return Pieces(module, merged, apart[0], norms, kernel, dtype)


@torch.no_grad()
def proved(found: Pieces) -> Attention | None:
    """How the pieces go together, if ours then does what the module does."""

    def run(x: Tensor, **rest: Any) -> Tensor:
        out, weights = type(found.module).forward(found.module, hidden_states=x, **rest)
        if weights is not None:
            raise TypeError("attention gives its weights")
        return out

    for attention in candidates(found):
        try:
            if all(
                agrees(run, CpuBlock(in_dtype(attention, each), None, each, found.kernel.digits(each)), found)
                for each in {torch.float32, found.dtype}
            ):
                return attention
        except REFUSALS:
            continue
    return None


def kernel_of(layers: list[QuantLinear]) -> CpuNative | None:
    """The kernel that all of some layers have, if it is ours for CPUs."""
    kernels = {each._choice.kernel for each in layers if each._choice is not None}
    if len(kernels) != 1 or not isinstance(kernel := kernels.pop(), CpuNative):
        return None
    return kernel


def norms_among(
    children: dict[str, nn.Module], dtype: torch.dtype
) -> tuple[list[Norm], dict[str, nn.Module]]:
    """Children that are norms, and the others."""
    norms, others = [], {}
    for name, child in children.items():
        rule = rule_of(child, dtype)
        if rule is None:
            others[name] = child
        else:
            weight = child.get_parameter("weight").detach()
            norms.append(Norm(weight, rule.epsilon, rule.offset, rule.rounds))
    return norms, others


def candidates(found: Pieces) -> Iterator[Attention]:
    """All ways to put the pieces together that fit."""
    size = found.module.head_dim
    head_norms: list[Any] = found.norms or [None, None]
    if size % WIDE or size > LARGEST_HEAD or found.out.out_features % WIDE:
        return
    qkv, out = joined(found.merged, found.dtype), joined((found.out,), found.dtype)
    for query, keys, values in _spans(found):
        if len(keys) != len(values) or len(query) != found.out.in_features:
            continue
        if len(query) % size or len(keys) % size or len(query) % len(keys):
            continue
        for of_query, of_keys in itertools.permutations(head_norms):
            if of_query is not None and not (
                len(query) % of_query.weight.numel() == 0 == len(keys) % of_keys.weight.numel()
            ):
                continue
            yield Attention(
                of_query,
                of_keys,
                qkv,
                out,
                (query.start, keys.start, values.start),
                len(query) // size,
                len(keys) // size,
                size,
                found.module.scaling,
            )


def _spans(found: Pieces) -> Iterator[tuple[range, range, range]]:
    """Which output channels may be queries, keys and values."""
    if len(found.merged) == 3:
        rows = [range(each._rows.start, each._rows.start + each.out_features) for each in found.merged]
        yield from itertools.permutations(rows, 3)
        return
    queries, channels = found.out.in_features, found.merged[0].out_features
    each = (channels - queries) // 2
    if each > 0:
        for order in itertools.permutations(((0, queries), (1, each), (2, each))):
            start, spans = 0, {}
            for what, count in order:
                spans[what] = range(start, start + count)
                start += count
            yield spans[0], spans[1], spans[2]


def joined(layers: tuple[QuantLinear, ...], dtype: torch.dtype) -> Product:
    """The product of layers that are multiplied at once, in that order."""
    state: Any = layers[0]._state
    if all(layer.bias is None for layer in layers):
        return Product(state, None)
    biases = [
        torch.zeros(layer.out_features, dtype=dtype) if layer.bias is None else layer.bias.to(dtype)
        for layer in layers
    ]
    return Product(state, torch.cat(biases))


def in_dtype(parts: Any, dtype: torch.dtype) -> Any:
    """A named tuple of which the products have their biases in another dtype."""
    return parts._replace(
        **{
            name: product._replace(bias=None if product.bias is None else product.bias.to(dtype))
            for name, product in parts._asdict().items()
            if isinstance(product, Product)
        }
    )


def agrees(run: Run, ours: CpuBlock, found: Pieces) -> bool:
    """Whether ours gives what a module gives, and puts the same into the cache, for random inputs.

    Args:
        run: the module that holds the attention, or the attention itself.
        ours: what would do for it.
        found: the attention.
    """
    generator, dtype, size = torch.Generator().manual_seed(0), ours.dtype, ours.attention.size
    exact = dtype is torch.float32
    close = _CLOSE if exact else max(_CLOSE, 4 * torch.finfo(dtype).eps)
    masks = torch.ones(2, 1, 1, _LENGTH + 1, dtype=torch.bool)
    masks[1, ..., :2] = False

    def drawn(channels: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(2, _LENGTH + 1, channels, generator=generator)).to(dtype)

    for turn, mask in itertools.product(_TURNS if exact else _TURNS[:1], (None, masks)):
        x = drawn(found.out.out_features)
        rotation = drawn(size, turn), drawn(size, turn)
        cache = DynamicCache()
        cache.layer_class_to_replicate = RoomyLayer
        causal = torch.ones(2, 1, _LENGTH, _LENGTH, dtype=torch.bool).tril()
        _run(run, cache, slice(_LENGTH), x, rotation, causal)
        layer: Any = cache.layers[found.module.layer_idx]
        keys_and_values = F.pad(layer.keys, (0, 0, 0, 1)), F.pad(layer.values, (0, 0, 0, 1))
        expected = _run(run, cache, slice(_LENGTH, None), x, rotation, mask)
        last = x[:, -1:].contiguous()
        cosines, sines = (each[:, -1:].contiguous() for each in rotation)
        got = ours(last, (cosines, sines), *keys_and_values, mask)
        before = 0 if ours.around is None else last  # what a block adds is what counts
        added = expected - before
        theirs = layer.keys, layer.values
        pairs = [
            (got - before, added, added if exact else expected),
            *zip(keys_and_values, theirs, theirs, strict=True),
        ]
        if any(float((one - other).norm()) > close * float(size.norm()) for one, other, size in pairs):
            return False
    return True


def _run(
    run: Run, cache: Any, tokens: slice, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """Some of the tokens, as a model calls a block or its attention, at positions far from each other."""
    out = run(
        x[:, tokens],
        attention_mask=mask,
        position_ids=(_APART * torch.arange(x.shape[1])[tokens]).expand(len(x), -1),
        past_key_values=cache,
        use_cache=True,
        position_embeddings=tuple(each[:, tokens] for each in rotation),
    )
    if not isinstance(out, Tensor):
        raise TypeError("a module that gives no tensor")
    return out

"""Fused decoding of a loaded model: fewer products for each token, and a key/value cache of a fixed length.

Layers that read the same tensor are found by running the model once on a few tokens, are merged
(`awq.nn.merge`), and the model is run again: should its output differ, or the run fail, they are layers of
their own again. Cache, compilation and CUDA graphs are transformers': see `awq.hf.static`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import ConfigError
from awq.hf.fused import attention
from awq.hf.fused.decoding import undo_native_blocks, use_native_blocks
from awq.hf.fused.expert_decoding import undo_native_experts, use_native_experts
from awq.hf.fused.grouped import undo_grouped, use_grouped
from awq.hf.fused.norms import undo_native_norms, use_native_norms
from awq.hf.fused.room import give_room, undo_give_room
from awq.hf.placement import is_spread
from awq.hf.static import StaticGeneration
from awq.kernels import cpu_native
from awq.nn import Merge, QuantExperts, QuantLinear, apart_because

# Tokens that find out who reads what; their ids mean nothing.
_PROBE = 4
# Kernels may add up in another order for more rows. A wrong part would be off by the whole.
_SAME = 0.05

_Run = tuple[str, QuantLinear, Tensor, int]


def fuse(model: Any, max_seq_len: int | None = None) -> list[tuple[str, ...]]:
    """Merge layers of a quantized model that read the same tensor, and let it generate with a static cache.

    A model that cannot be fused, or only in part, is left right as it is, and one warning says why.

    Args:
        model: a transformers model with `QuantLinear` layers, in eval mode. Of one that is spread over
            several devices or offloaded in part, layers that are in memory on one device are merged.
        max_seq_len: tokens that the static cache holds, prompts included; None for a cache that grows.

    Returns:
        The names of the layers of each merge.

    Raises:
        ConfigError: `max_seq_len` is no number of tokens.
    """
    if max_seq_len is not None and max_seq_len < 1:
        raise ConfigError(f"max_seq_len={max_seq_len} is no number of tokens; leave it out, or give one")
    reason = _reason_against(model)
    if reason is not None:
        _warn(f"layers are not fused: {reason}")
        return []
    try:
        merged = _merge(model)
    except Exception as error:  # the model's own code, on inputs that it may not take
        _warn(f"layers are not fused: the model does not run on a few tokens alone ({error})")
        merged = []
    if max_seq_len is not None:
        reason = StaticGeneration.reason_against(model)
        if is_spread(model):  # without compilation a static cache costs time
            reason = "the model is spread over several devices or offloaded, and is not compiled then"
        if reason is None:
            model.generate = StaticGeneration(model, max_seq_len)
            use_grouped(model, max_seq_len)
        else:
            _warn(f"the key/value cache grows as it is needed, without a fixed length: {reason}")
    if model.device.type == "cpu" and isinstance(cpu_native.load(), cpu_native.native.Native):
        _use_native(model)
    return merged


def unfuse(model: Any) -> None:
    """Undo `fuse`."""
    for module in model.modules():
        if isinstance(module, QuantLinear) and module._merge is not None:
            module._merge.undo()
    if isinstance(model.__dict__.get("generate"), StaticGeneration):
        del model.generate
        undo_grouped(model)
    _undo_native(model)


def _reason_against(model: Any) -> str | None:
    """Why a model cannot be fused at all."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if not layers:
        return "the model has no quantized layers"
    if model.training:
        return "the model is in training mode; call eval() first"
    if all(layer.is_away or layer.is_offloaded for layer in layers):
        return "all of them are offloaded"
    if any(layer._merge is not None for layer in layers):
        return "they are fused already"
    return None


@torch.no_grad()
def _merge(model: Any) -> list[tuple[str, ...]]:
    runs: list[_Run] = []
    with _watched(model, runs):
        before = _run(model)
    groups = list(_groups(runs))
    merges = [Merge([layer for _, layer in group]) for group in groups]
    try:
        _raise_if_different(_run(model), before)
    except Exception:
        for merge in merges:
            merge.undo()
        raise
    return [tuple(name for name, _ in group) for group in groups]


@torch.no_grad()
def _use_native(model: Any) -> None:
    """What lies between products, in C++, and a cache with room to grow."""
    _undo_native(model)  # a copy of a fused model has what stood in for its original's modules
    try:
        before = _decode(model)
        use_native_blocks(model, model.dtype)
        use_native_experts(model, model.dtype)
        use_native_norms(model, model.dtype)
        if attention.pays() and attention.is_plain(model):
            attention.use(model, attention.NAME, attention.attend)
        give_room(model)
        _raise_if_different(_decode(model), before)
    except Exception as error:  # the model's own code, on inputs that it may not take
        _undo_native(model)
        _warn(f"what lies between products stays transformers' own: {error}")


def _undo_native(model: Any) -> None:
    undo_give_room(model)
    undo_native_blocks(model)
    undo_native_experts(model)
    undo_native_norms(model)
    attention.undo(model, attention.NAME)


def _run(model: Any) -> Tensor:
    """Logits of a few tokens, float32."""
    logits: Tensor = model(input_ids=_probe(model), use_cache=False).logits
    return logits.float().cpu()


def _decode(model: Any) -> Tensor:
    """Logits of the last of a few tokens, float32, from a cache of those before it."""
    ids = _probe(model)
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    logits: Tensor = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
    return logits.float().cpu()


def _probe(model: Any) -> Tensor:
    device = model.get_input_embeddings().weight.device
    # What is offloaded says meta, and takes inputs from anywhere.
    return torch.arange(1, _PROBE + 1, device="cpu" if device.type == "meta" else device).unsqueeze(0)


def _raise_if_different(logits: Tensor, before: Tensor) -> None:
    difference = (logits - before).norm() / before.norm()
    if not bool(difference <= _SAME):
        raise ValueError(f"its output changes by {float(difference):.1%}")


@contextmanager
def _watched(model: nn.Module, runs: list[_Run]) -> Iterator[None]:
    """Note each run of a quantized layer that is no expert: name, layer, input and version of the input."""
    experts = [path for path, module in model.named_modules() if isinstance(module, QuantExperts)]
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if not isinstance(module, QuantLinear) or any(path.startswith(f"{name}.") for name in experts):
                continue

            def note(layer: Any, args: Any, path: str = path) -> None:
                # Holding the tensor keeps its identity its own.
                runs.append((path, layer, args[0], args[0]._version))

            stack.callback(module.register_forward_pre_hook(note).remove)
        yield


def _groups(runs: list[_Run]) -> Iterator[list[tuple[str, QuantLinear]]]:
    """Layers of one module that ran once, on one tensor, and can be multiplied at once; in running order."""
    count: dict[str, int] = {}
    for path, *_ in runs:
        count[path] = count.get(path, 0) + 1
    readers: dict[tuple[str, int, int], list[tuple[str, QuantLinear]]] = {}
    for path, layer, tensor, version in runs:
        if count[path] == 1:
            key = (path.rpartition(".")[0], id(tensor), version)
            readers.setdefault(key, []).append((path, layer))
    for group in readers.values():
        if len(group) > 1 and apart_because([layer for _, layer in group]) is None:
            yield group


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)

"""AutoAWQ 0.2.9's procedure, written anew for Llama-like models: the baseline to compare with.

Scales by grid search over the enclosing module's exact output, with forward passes over every calibration
token for each of twenty ratios; symmetric clip search on about 512 sampled tokens, not for q and k; rounding
to nearest; every block sees the outputs of the unquantized blocks before it. Computed in float32, as kindly
as possible to the procedure, and rounded with float16 scales as its checkpoints store them.

Details that its code adds to the paper: weights of the layers that share an input are stacked for the weight
magnitude; the ratio 0 is not the identity under duo scaling; all scales of a block are searched before any is
applied; v_proj → o_proj only where the shapes agree; zero points are clamped without widening the range to
contain zero.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_GRID = 20
_CLIP_STEPS = 10
_CLIP_TOKENS = 512
_BATCH = 16


def pseudo_quantize(weight: Tensor, bits: int, group_size: int, storage: torch.dtype | None = None) -> Tensor:
    """Round a weight `[out, in]` to its codes and back."""
    grouped = weight.reshape(-1, group_size)
    high, low = grouped.amax(1, keepdim=True), grouped.amin(1, keepdim=True)
    levels = 2**bits - 1
    scales = (high - low).clamp(min=1e-5) / levels
    zeros = (-torch.round(low / scales)).clamp(0, levels)
    codes = torch.clamp(torch.round(grouped / scales) + zeros, 0, levels)
    if storage is not None:
        scales = scales.to(storage).float()
    return ((codes - zeros) * scales).view(weight.shape)


def quantizable(layer: nn.Linear, group_size: int) -> bool:
    """Whether groups cover the layer; the same layers stay float for every method compared."""
    return layer.in_features % group_size == 0 and layer.out_features % 8 == 0


def linears(block: nn.Module, group_size: int) -> dict[str, nn.Linear]:
    """The layers of a block that are quantized."""
    found = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    return {name: layer for name, layer in found.items() if quantizable(layer, group_size)}


@torch.no_grad()
def plain_rounding(model: Any, bits: int, group_size: int) -> Any:
    """A copy of a model with every layer rounded to nearest."""
    model = copy.deepcopy(model)
    for block in model.model.layers:
        for layer in linears(block, group_size).values():
            layer.weight.data = pseudo_quantize(layer.weight.data, bits, group_size, torch.float16)
    return model


@torch.no_grad()
def autoawq(model: Any, ids: Tensor, bits: int, group_size: int) -> tuple[Any, dict[str, float]]:
    """A copy of a model quantized by AutoAWQ's procedure (values in place), and the seconds it took.

    Args:
        model: float32 Llama-like model (`model.layers[i].self_attn`, `.mlp`, two norms).
        ids: int64 `[samples, tokens]`.
        bits, group_size: what to round to.
    """
    started = time.perf_counter()
    model = copy.deepcopy(model)
    hidden = model.model.embed_tokens(ids)
    places = torch.arange(ids.shape[1]).unsqueeze(0)
    rotary = model.model.rotary_emb(hidden[:1], places)
    kwargs = {"position_embeddings": rotary, "attention_mask": None}
    search = 0.0
    for block in model.model.layers:
        hidden, features = _forward(block, hidden, kwargs, group_size)
        begun = time.perf_counter()
        _scale(block, features, kwargs, bits, group_size)
        _clip(block, features, bits, group_size)
        search += time.perf_counter() - begun
        for layer in linears(block, group_size).values():
            layer.weight.data = pseudo_quantize(layer.weight.data, bits, group_size, torch.float16)
    return model, {"search": search, "total": time.perf_counter() - started}


def _forward(
    block: nn.Module, hidden: Tensor, kwargs: dict[str, Any], group_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output, and the inputs of its layers."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in linears(block, group_size)}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: pieces[name].append(args[0]))
        for name, layer in linears(block, group_size).items()
    ]
    out = torch.cat([block(part, **kwargs) for part in hidden.split(_BATCH)])
    for handle in handles:
        handle.remove()
    return out, {name: torch.cat(parts) for name, parts in pieces.items()}


def _scale(
    block: Any, features: dict[str, Tensor], kwargs: dict[str, Any], bits: int, group_size: int
) -> None:
    """Search every scale of a block, then apply them and divide the inputs."""
    attention, mlp = block.self_attn, block.mlp

    def attend(inputs: Tensor) -> Tensor:
        return torch.cat([attention(part, **kwargs)[0] for part in inputs.split(_BATCH)])

    jobs: list[tuple[Any, list[str], Callable[[Tensor], Tensor]]] = [
        (block.input_layernorm, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], attend),
        (block.post_attention_layernorm, ["mlp.gate_proj", "mlp.up_proj"], mlp),
        (mlp.up_proj, ["mlp.down_proj"], mlp.down_proj),
    ]
    if attention.v_proj.weight.shape == attention.o_proj.weight.shape:
        jobs.insert(1, (attention.v_proj, ["self_attn.o_proj"], attention.o_proj))
    found = [
        (producer, names, _best_scale(block, names, features[names[0]], run, bits, group_size))
        for producer, names, run in jobs
        if all(name in features for name in names)
    ]
    for producer, names, scale in found:
        rows = scale if producer.weight.dim() == 1 else scale.unsqueeze(1)
        producer.weight.data = producer.weight.data / rows
        if getattr(producer, "bias", None) is not None:
            producer.bias.data = producer.bias.data / scale
        for name in names:
            block.get_submodule(name).weight.data.mul_(scale)
            features[name] = features[name] / scale


def _best_scale(
    block: nn.Module,
    names: list[str],
    inputs: Tensor,
    run: Callable[[Tensor], Tensor],
    bits: int,
    group_size: int,
) -> Tensor:
    layers = [block.get_submodule(name) for name in names]
    stacked = torch.cat([layer.weight for layer in layers])
    grouped = stacked.view(-1, group_size)
    relative = grouped.abs() / (grouped.abs().amax(1, keepdim=True) + 1e-6)
    w_mean = relative.view(stacked.shape).mean(0)
    x_mean = inputs.reshape(-1, inputs.shape[-1]).abs().mean(0)
    target = run(inputs)
    original = [layer.weight.data for layer in layers]
    best, best_error = torch.ones_like(x_mean), float("inf")
    for step in range(_GRID):
        ratio = step / _GRID
        scale = (x_mean.pow(ratio) / (w_mean.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        scale[~torch.isfinite(scale)] = 1
        for layer, weight in zip(layers, original, strict=True):
            layer.weight.data = pseudo_quantize(weight * scale, bits, group_size) / scale
        error = float((run(inputs) - target).pow(2).mean())
        if error < best_error:
            best, best_error = scale, error
    for layer, weight in zip(layers, original, strict=True):
        layer.weight.data = weight
    return best


def _clip(block: nn.Module, features: dict[str, Tensor], bits: int, group_size: int) -> None:
    for name, layer in linears(block, group_size).items():
        if "q_" in name or "k_" in name:
            continue
        limit = _best_clip(layer.weight.data, features[name], bits, group_size)
        grouped = layer.weight.data.view(*limit.shape[:2], group_size)
        layer.weight.data = torch.clamp(grouped, -limit, limit).view(layer.weight.shape)


def _best_clip(weight: Tensor, inputs: Tensor, bits: int, group_size: int) -> Tensor:
    """The largest magnitude kept in each group, `[out, groups, 1]`."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    rows = rows[:: max(1, rows.shape[0] // _CLIP_TOKENS)]
    sampled = rows.view(rows.shape[0], -1, group_size).transpose(0, 1)
    limits = []
    for part in weight.split(256):
        grouped = part.view(part.shape[0], -1, group_size)
        full = grouped.abs().amax(-1, keepdim=True)
        best, least = full.clone(), torch.full_like(full, 1e9)
        target = torch.einsum("gtk,ogk->otg", sampled, grouped)
        for step in range(_CLIP_STEPS):
            limit = full * (1 - step / _GRID)
            clamped = torch.clamp(grouped, -limit, limit)
            rounded = pseudo_quantize(clamped.reshape(part.shape), bits, group_size).view(grouped.shape)
            error = (torch.einsum("gtk,ogk->otg", sampled, rounded) - target).pow(2).mean(1).unsqueeze(-1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, limit, best)
        limits.append(best)
    return torch.cat(limits)

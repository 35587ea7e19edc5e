"""Rounding the layers of a block: those that share an input together, in the order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from awq.config import QuantConfig, Setting
from awq.kernels.triton_panel import mover_for, panel_for
from awq.model.layers import linears_of
from awq.pipeline.memory import give_back
from awq.pipeline.precision import matmul_precision
from awq.search import Codes, InputStats, full_range, gptq, nearest, output_error, refine, search_clip
from awq.search.rounding import round_panel

# Most weights of layers with a common input that are rounded together (float32: 1 GB).
_STACKED = 1 << 28

# Corrects the weight `[out, in]` of layers with a common input, given the codes of those before them.
Corrector = Callable[[Sequence[str], Mapping[str, Codes], Tensor], Tensor]


class Way(NamedTuple):
    """How weights become codes: the rounding (`nearest` or `gptq`), and whether ranges are searched."""

    rounding: str
    clip: bool


class Rounded(NamedTuple):
    """Codes by layer, and each layer's output error relative to its output, for the weight it rounded."""

    codes: dict[str, Codes]
    errors: dict[str, float]


def round_layers(
    block: nn.Module,
    layers: Mapping[str, Setting],
    stats: Mapping[str, InputStats],
    first_of: Mapping[str, str],
    config: QuantConfig,
    dtype: torch.dtype,
    way: Way,
    correct: Corrector | None = None,
) -> Rounded:
    """Round the weights that the block holds.

    Layers that share an input are stacked: rows are independent of one another.

    Args:
        block: float weights in place.
        layers: the layers to round and to what, in the order they run.
        stats: by the first layer of each shared input.
        first_of: for each layer the first one of its input.
        config: what to quantize to.
        dtype: storage dtype of the scales.
        way: how.
        correct: changes the weight of a stack before it is rounded.
    """
    linears = linears_of(block)
    out = Rounded({}, {})
    for first, members in _stacks(linears, layers, first_of):
        weight = torch.cat([linears[name].weight.data for name in members])
        if correct is not None:
            weight = correct(members, out.codes, weight)
        stacked = round_weight(weight, stats[first], layers[members[0]], config, dtype, way)
        rows = [linears[name].out_features for name in members]
        for name, part, *codes in zip(
            members, weight.split(rows), *(t.split(rows) for t in stacked), strict=True
        ):
            out.codes[name] = Codes(*codes)
            out.errors[name] = relative_error(part, out.codes[name], stats[first])
    return out


def round_weight(
    weight: Tensor, seen: InputStats, setting: Setting, config: QuantConfig, dtype: torch.dtype, way: Way
) -> Codes:
    """Codes of a weight float32 `[out, in]`."""
    bits, size, symmetric = setting.bits, setting.size(weight.shape[1]), not config.zero_point
    if way.clip and seen.tokens:
        low, high = search_clip(weight, seen, bits, size, dtype, symmetric=symmetric)
    else:
        low, high = full_range(weight, size)
    if way.rounding == "nearest":
        return nearest(weight, low, high, bits, dtype, symmetric)
    panel = panel_for(weight.device) or round_panel
    if weight.device.type == "cpu":
        give_back()
    codes = gptq(weight, seen, low, high, bits, dtype, panel, symmetric)
    with matmul_precision("highest"):
        return refine(weight, seen, codes, bits, config.refine, mover_for(weight.device))


def _stacks(
    linears: Mapping[str, nn.Linear], layers: Mapping[str, Setting], first_of: Mapping[str, str]
) -> Iterator[tuple[str, list[str]]]:
    """Layers with a common input that are quantized alike, as many at a time as may be stacked; with the
    first layer of that input."""
    together: dict[tuple[str, Setting], list[str]] = {}
    for name, setting in layers.items():
        together.setdefault((first_of[name], setting), []).append(name)
    for (first, _), members in together.items():
        stack: list[str] = []
        size = 0
        for name in members:
            weights = linears[name].weight.numel()
            if stack and size + weights > _STACKED:
                yield first, stack
                stack, size = [], 0
            stack.append(name)
            size += weights
        yield first, stack


@contextmanager
def holding(block: nn.Module, codes: Mapping[str, Codes]) -> Iterator[None]:
    """Within a `with` block, the layers hold the values of `codes`."""
    kept = {name: block.get_submodule(name).weight.data for name in codes}
    try:
        for name, layer in codes.items():
            block.get_submodule(name).weight.data = layer.values()
        yield
    finally:
        for name, value in kept.items():
            block.get_submodule(name).weight.data = value


def relative_error(weight: Tensor, codes: Codes, stats: InputStats) -> float:
    """Mean squared output error of a layer relative to its mean squared output."""
    error = float(output_error(codes.values() - weight.data, stats).double().sum())
    return error / max(float(output_error(weight.data, stats).double().sum()), 1e-300)

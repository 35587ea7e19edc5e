"""Several widths in one model: which layers get more bits, fewer, or stay float, under a budget.

One pass over the blocks, before the work itself and as sparing of memory, measures what each choice would do:
the layers that must be treated alike (q/k/v, gate/up, all experts of a layer) are rounded to nearest, and the
error is taken at the block's output. One choice is measured through the block; the others follow from it by
the ratio of their errors tr(ΔW G ΔWᵀ). Then `awq.search.budget` spends the budget over the whole model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awq.config import FORMAT_BITS, PLAIN_FORMATS, QuantConfig, Setting
from awq.errors import ConfigError
from awq.formats import get_format
from awq.formats.entry import MIXING
from awq.model import Skeleton
from awq.model.experts import expert_names
from awq.model.layers import Structure, linears_of
from awq.pipeline.feed import Feed
from awq.pipeline.kinds import KindPlan
from awq.pipeline.observe import Batch, Seen, measure
from awq.pipeline.preflight import scale_dtype, storage_dtype
from awq.pipeline.stacks import holding
from awq.search import Codes, full_range, nearest, output_error
from awq.search.budget import Choice, spend

_SIZES = (32, 64, 128)
# Widths that are worth a choice where not every reader of the layout has all of them: vLLM has these.
_WIDTHS = {"compressed-tensors": (4, 8)}
# Tokens on which a choice is measured through the block.
_JUDGED_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Unit:
    """Layers of a block that are treated alike.

    Args:
        layers: names inside the block.
        weights: how many they have together.
        float_bytes: their size as they are.
        errors: of each setting that fits; what stays float has none.
        bytes: of each of these settings.
    """

    layers: tuple[str, ...]
    weights: int
    float_bytes: int
    errors: dict[Setting, float]
    bytes: dict[Setting, int]

    def choices(self) -> list[tuple[Setting | None, Choice]]:
        """Every setting, and none at all."""
        out = [(setting, Choice(self.bytes[setting], error)) for setting, error in self.errors.items()]
        return [*out, (None, Choice(self.float_bytes, 0.0))]


@dataclasses.dataclass(frozen=True)
class Mix:
    """What was chosen.

    Args:
        blocks: for each block, what each layer is quantized to; those that are not named stay float.
        bits: of a weight on disk, on average over all layers that could be quantized, scales included.
    """

    blocks: list[dict[str, Setting]]
    bits: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        blocks = [{name: list(setting) for name, setting in block.items()} for block in self.blocks]
        return {"blocks": blocks, "bits": self.bits}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Mix:
        """Undo `to_dict`."""
        blocks = [{name: Setting(*held) for name, held in block.items()} for block in value["blocks"]]
        return cls(blocks, value["bits"])


def settings_for(config: QuantConfig) -> list[Setting]:
    """What a layer may be quantized to: the configuration's own, and others where the layout can mix."""
    if config.target_bits is None or config.format not in (*MIXING, *PLAIN_FORMATS):
        return [config.setting]
    widths = _WIDTHS.get(config.format, FORMAT_BITS[config.format])
    others = {Setting(bits, size) for bits in widths for size in {config.group_size, *_SIZES}}
    return [config.setting, *sorted(others - {config.setting})]


def common_size(config: QuantConfig) -> int:
    """A number of channels that is made of whole groups of every size in question; -1 for the row."""
    sizes = [setting.group_size for setting in settings_for(config)]
    return -1 if -1 in sizes else math.lcm(*sizes)


def narrowed(kind: KindPlan, settings: Mapping[str, Setting]) -> KindPlan:
    """The plan of one block, with the layers left float that were not chosen."""
    floats = [name for name in kind.layers if name not in settings]
    reasons = dict.fromkeys(floats, "more bits help most here, within the budget")
    return dataclasses.replace(kind, layers=tuple(settings), skipped={**kind.skipped, **reasons})


def units_of(block: nn.Module, structure: Structure, layers: Sequence[str]) -> list[tuple[str, ...]]:
    """Layers that engines fuse or run together, in the order of `layers`; most stand alone."""
    owner = {name: place.owner for name, place in expert_names(block).items()}
    first_of = {name: first for first, members in structure.inputs.items() for name in members}
    together: dict[tuple[str, str], list[str]] = {}
    for name in layers:
        key = (owner[name], "experts") if name in owner else (first_of[name], name.rpartition(".")[0])
        together.setdefault(key, []).append(name)
    return [tuple(members) for members in together.values()]


def measure_model(
    skeleton: Skeleton,
    list_name: str,
    kinds: Sequence[KindPlan],
    feed: Feed,
    config: QuantConfig,
    device: torch.device,
) -> list[list[Unit]]:
    """The units of every block; one block is in memory at a time.

    Args:
        skeleton: the opened model.
        list_name: its list of blocks.
        kinds: the kind of each block.
        feed: in front of the first block; it is used up.
        config: what to quantize to.
        device: where the work is done.
    """
    out = []
    for index, kind in enumerate(kinds):
        name = f"{list_name}.{index}"
        block = skeleton.model.get_submodule(name)
        skeleton.load(block, name, device)
        batches = feed.at(index)
        seen = measure(block, kind.structure, kind.layers, batches, device, common_size(config))
        keys = {layer: skeleton.keys[f"{name}.{layer}.weight"] for layer in kind.layers}
        dtypes = {
            layer: storage_dtype(config, skeleton.reader.tensors[key].dtype) for layer, key in keys.items()
        }
        out.append(measure_units(block, kind, seen, batches, config, dtypes, device))
        skeleton.unload(block)
        # The probes are not needed here, and stay where they are.
        feed.hidden = seen.outputs + feed.hidden[len(seen.outputs) :]
    return out


def measure_units(
    block: nn.Module,
    kind: KindPlan,
    seen: Seen,
    batches: Sequence[Batch],
    config: QuantConfig,
    float_dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> list[Unit]:
    """The units of a block, with the error of each setting that fits.

    Args:
        block: float32, original weights in place.
        kind: its structure, and the layers that may be quantized.
        seen: what they saw, and the block's outputs.
        batches: what the block was given.
        config: what to quantize to.
        float_dtypes: on disk, of each layer's weight if it stays float.
        device: where the block is.
    """
    linears = linears_of(block)
    first_of = {name: first for first, members in kind.structure.inputs.items() for name in members}
    out = []
    for layers in units_of(block, kind.structure, kind.layers):
        weights = {name: linears[name].weight.data for name in layers}
        errors: dict[Setting, float] = {}
        sizes: dict[Setting, int] = {}
        factor: float | None = None
        for setting in settings_for(config):
            held = [_bytes(config, weight.shape, setting) for weight in weights.values()]
            if any(size is None for size in held):
                continue
            codes = {name: _rounded(weight, setting, config) for name, weight in weights.items()}
            error = sum(
                float(output_error(layer.values() - weights[name], seen.stats[first_of[name]]).double().sum())
                for name, layer in codes.items()
            )
            if factor is None:
                through = _through(block, codes, batches, seen.outputs, device)
                factor = through / error if error > 0 and math.isfinite(through) else 1.0
            errors[setting] = error * factor
            sizes[setting] = sum(size for size in held if size is not None)
        count = sum(weight.numel() for weight in weights.values())
        floats = sum(weights[name].numel() * float_dtypes[name].itemsize for name in layers)
        out.append(Unit(layers, count, floats, errors, sizes))
    return out


def choose(blocks: Sequence[Sequence[Unit]], target_bits: float) -> Mix:
    """Spend the budget.

    Args:
        blocks: the units of each block.
        target_bits: of a weight on disk, on average.

    Raises:
        ConfigError: not even the smallest settings fit.
    """
    units = [(number, unit) for number, block in enumerate(blocks) for unit in block]
    choices = [unit.choices() for _, unit in units]
    weights = sum(unit.weights for _, unit in units)
    plain = [[choice for _, choice in unit] for unit in choices]
    chosen = spend(plain, target_bits * weights / 8)
    if chosen is None:
        least = sum(min(choice.bytes for choice in unit) for unit in plain) * 8 / weights
        raise ConfigError(
            f"target_bits={target_bits}: the smallest settings of this format take {least:.3f} bits of a "
            "weight, scales included; raise it, or choose larger groups or another format"
        )
    out: list[dict[str, Setting]] = [{} for _ in blocks]
    for (number, unit), options, index in zip(units, choices, chosen, strict=True):
        setting = options[index][0]
        if setting is not None:
            out[number] |= dict.fromkeys(unit.layers, setting)
    spent = sum(unit[index].bytes for unit, index in zip(plain, chosen, strict=True))
    return Mix(out, spent * 8 / weights)


def _bytes(config: QuantConfig, shape: Sequence[int], setting: Setting) -> int | None:
    """Size on disk of a weight `[out, in]`; None if the layout cannot hold it.

    Plain weights are counted as if they were codes: what they stand in for.
    """
    rows, columns = shape
    size = setting.size(columns)
    if get_format(config.format).supports(rows, columns, size, setting.bits):
        return None
    if config.format in PLAIN_FORMATS:
        return math.ceil(rows * columns * setting.bits / 8 + rows * columns / size * (16 + setting.bits) / 8)
    layout = get_format(config.format, not config.zero_point)
    shapes = layout.packed_shapes(rows, columns, size, scale_dtype(config), setting.bits).values()
    return sum(dtype.itemsize * math.prod(extent) for dtype, extent in shapes)


def _rounded(weight: Tensor, setting: Setting, config: QuantConfig) -> Codes:
    low, high = full_range(weight, setting.size(weight.shape[1]))
    return nearest(weight, low, high, setting.bits, scale_dtype(config), not config.zero_point)


def _through(
    block: nn.Module,
    codes: Mapping[str, Codes],
    batches: Sequence[Batch],
    outputs: Sequence[Tensor],
    device: torch.device,
) -> float:
    """Error of the block's output with `codes` in place, as large as it stays in the hidden states behind.

    It is the mean over tokens of |change|² / |output|², times the median of |output|²: a few massive tokens
    count no more than others, and a change counts as much in an early block as in a late one, since later
    blocks only add to the hidden states.
    """
    tokens = sum(batch.tokens for batch in batches)
    shares, squares = [], []
    with holding(block, codes):
        for batch, output in list(zip(batches, outputs, strict=True))[:: max(1, tokens // _JUDGED_TOKENS)]:
            reference = output.to(device)
            change = batch.run(block, device) - reference
            square = reference.square().sum(-1).clamp_min(torch.finfo(reference.dtype).tiny)
            keep = torch.ones_like(square, dtype=torch.bool) if batch.mask is None else batch.mask.to(device)
            shares.append((change.square().sum(-1) / square)[keep])
            squares.append(square[keep])
    return float(torch.cat(shares).double().mean() * torch.cat(squares).double().median())

"""What will be done, known before anything is: files, memory, disk."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from awq.config import PLAIN_FORMATS, QuantConfig, Setting
from awq.errors import DiskFullError
from awq.formats import get_format
from awq.model import Skeleton
from awq.model.layers import linears_of, readers_of, width_of
from awq.model.weights import FLOAT_DTYPES, TensorInfo
from awq.pipeline.kinds import KindPlan
from awq.pipeline.memory import channels_at_once
from awq.pipeline.writer import ShardPlan, TensorPlan, plan_shards, tensor_plan


@dataclasses.dataclass(frozen=True)
class Files:
    """The result on disk.

    Args:
        shards: the files to be written.
        copies: `{checkpoint key: key}` of tensors that are carried over byte by byte or cast.
        dtypes: storage dtype of each float tensor that is written anew, by checkpoint key.
        unused: tensors among the copies that the model class does not use.
        fused: tensors written as the checkpoint has them, with all experts of a layer in one.
    """

    shards: list[ShardPlan]
    copies: list[str]
    dtypes: dict[str, torch.dtype]
    unused: list[str]
    fused: dict[str, TensorInfo] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.size for shard in self.shards)


def plan_files(
    skeleton: Skeleton,
    list_name: str,
    quantized: Mapping[str, tuple[nn.Linear, Setting]],
    config: QuantConfig,
    max_shard_bytes: int,
) -> Files:
    """Plan every tensor of the result.

    Args:
        skeleton: the opened model.
        list_name: the list of decoder blocks.
        quantized: `{checkpoint key of a weight: (its layer, what it is quantized to)}`.
        config: what to quantize to.
        max_shard_bytes: files hold at most this much.
    """
    layout = get_format(config.format, not config.zero_point)
    in_blocks = {key for name, key in skeleton.keys.items() if name.startswith(f"{list_name}.")}
    plans: list[TensorPlan] = []
    copies: list[str] = []
    dtypes: dict[str, torch.dtype] = {}
    fused = skeleton.reader.fused(set() if config.format in PLAIN_FORMATS else set(quantized))
    hidden = {name for name, view in skeleton.reader.views.items() if view.source in fused}
    for key, info in (skeleton.reader.tensors | fused).items():
        if info.dtype in FLOAT_DTYPES:
            dtypes[key] = storage_dtype(config, info.dtype)
        if key in hidden:
            continue
        if key in quantized:
            layer, setting = quantized[key]
            stem = key.removesuffix("weight")
            if config.format in PLAIN_FORMATS:
                plans.append(tensor_plan(key, dtypes[key], info.shape))
                continue
            dtype = scale_dtype(config)
            shapes = layout.packed_shapes(
                layer.out_features, layer.in_features, setting.size(layer.in_features), dtype, setting.bits
            )
            plans += [tensor_plan(stem + name, dtype, shape) for name, (dtype, shape) in shapes.items()]
            continue
        if key not in in_blocks and key not in fused:
            copies.append(key)
        if key in dtypes:
            plans.append(tensor_plan(key, dtypes[key], info.shape))
        else:
            plans.append(TensorPlan(key, info.dtype, info.shape, info.bytes))
    unused = skeleton.unused()
    framework = "mlx" if config.format == "mlx" else "pt"
    return Files(plan_shards(plans, max_shard_bytes, unused, framework), copies, dtypes, unused, fused)


def storage_dtype(config: QuantConfig, stored: str) -> torch.dtype:
    """Dtype on disk of a float tensor: its own, unless the user names one. MLX wants that of the scales."""
    if config.format == "mlx":
        return scale_dtype(config)
    return FLOAT_DTYPES[stored] if config.dtype == "auto" else getattr(torch, config.dtype)


def scale_dtype(config: QuantConfig) -> torch.dtype:
    """Dtype on disk of quantization scales."""
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float16


# Bytes a weight that tuning takes, measured on a block of linear layers.
_TUNING_BYTES = 43


def predict_peak(
    blocks: Sequence[nn.Module],
    kinds: Sequence[KindPlan],
    batch_tokens: int,
    surrounding_bytes: int,
    hidden_bytes: int,
    followed_bytes: int = 0,
    tuning: bool = False,
) -> int:
    """Bytes that the work will take at its peak, beyond what the process holds already.

    The largest block counts twice (its weights, and a candidate's values) plus a byte a weight for each of
    three candidates' codes; G of every distinct input, and four times the largest for its inverse; the
    activations of a batch; the hidden states before and behind the block, and for samples followed those of
    the quantized blocks and a sum inside the block. Tuning holds for each weight what moves it and its
    gradients.
    """
    peak, a_weight = surrounding_bytes, 11 + (_TUNING_BYTES if tuning else 0)
    for block, kind in zip(blocks, kinds, strict=True):
        readers = readers_of(block)
        weights = sum(parameter.numel() for parameter in block.parameters())
        squares = [width_of(readers[first]) ** 2 for first in kind.structure.inputs]
        grams = sum(squares) + 4 * max(squares, default=0)
        activations = batch_tokens * channels_at_once(block)
        stacked = max((layer.weight.numel() for layer in linears_of(block).values()), default=0)
        peak = max(peak, a_weight * weights + 4 * grams + 4 * activations + 12 * stacked)
    return peak + 2 * hidden_bytes + 3 * followed_bytes


def check_disk(out: Path, needed: int) -> None:
    """Refuse work whose result the disk cannot hold.

    Raises:
        DiskFullError: with both figures.
    """
    place = out
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DiskFullError(
            f"{out} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "choose another place or free some space"
        )

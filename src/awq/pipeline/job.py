"""What a run knows before it works: blocks and their kinds, what each layer becomes, files, the estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from awq.calibration import CalibrationSet
from awq.config import QuantConfig, Setting
from awq.model import Skeleton, find_blocks
from awq.model.layers import linears_of
from awq.model.overrides import Overrides
from awq.pipeline.discover import discover
from awq.pipeline.feed import Feed
from awq.pipeline.journal import Journal, recognise
from awq.pipeline.kinds import KindPlan, require_layers, require_scales
from awq.pipeline.memory import batch_tokens_for, surrounding_bytes
from awq.pipeline.mix import Mix, choose, measure_model, narrowed
from awq.pipeline.preflight import Files, plan_files, predict_peak
from awq.pipeline.report import Plan
from awq.pipeline.skipped import left_float

# One of so many samples shows weights what to make up for: more are hardly better, and cost time.
_FOLLOWED = 4


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a run.

    Args:
        skeleton: the opened model.
        calibration: its samples.
        config: what to quantize to.
        overrides: what is known better about the model.
        device: where blocks are worked on.
        batch_tokens: tokens of a batch; None leaves that to the free memory.
        max_shard_bytes: size of an output file at most.
    """

    skeleton: Skeleton
    calibration: CalibrationSet
    config: QuantConfig
    overrides: Overrides
    device: torch.device
    batch_tokens: int | None
    max_shard_bytes: int

    def settings(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        import transformers

        import awq

        return {
            "config": self.config.to_dict(),
            "overrides": self.overrides.to_dict(),
            "model": recognise(self.skeleton.reader),
            "calibration": self.calibration.fingerprint(),
            "batch_tokens": self.batch_tokens,
            "max_shard_bytes": self.max_shard_bytes,
            "device": self.device.type,
            "openawq": awq.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }


@dataclasses.dataclass
class Job:
    """A run that is planned, and has written nothing yet.

    Args:
        list_name: the list of blocks.
        blocks: the blocks, without weights.
        kinds: for each block, what was discovered about its kind.
        mix: for each block, what its layers are quantized to.
        feed: the calibration samples, embedded.
        files: the result on disk.
        layers: what each quantized layer becomes, by its name in the checkpoint.
        notes: what deserves a line before the work begins.
        plan: the same for people.
    """

    list_name: str
    blocks: list[nn.Module]
    kinds: list[KindPlan]
    mix: Mix
    feed: Feed
    files: Files
    layers: dict[str, Setting]
    notes: list[str]
    plan: Plan


def prepare(
    request: Request, unfinished: Journal | None, choosing: Callable[[], AbstractContextManager[None]]
) -> Job:
    """Plan a run.

    Args:
        request: what is asked.
        unfinished: the journal of the run that is continued. Its batches and threads are taken over: both
            decide how sums are rounded, and so the bytes.
        choosing: entered around a pass over all blocks that measures what to spend a budget on, if one is
            needed.

    Raises:
        AwqError: nothing in the model can be quantized as asked.
    """
    skeleton, config, device = request.skeleton, request.config, request.device
    list_name, found = find_blocks(skeleton.model, request.overrides.blocks)
    blocks = list(found)
    tokens = request.batch_tokens or batch_tokens_for(device, blocks, bool(config.tune))
    if unfinished is not None:
        tokens = unfinished.batch_tokens
        torch.set_num_threads(unfinished.threads)
    follow = _share_followed(config)
    feed = Feed(skeleton, list_name, request.calibration.samples, tokens, device, follow)
    kinds, kind_of_block = discover(skeleton, list_name, blocks, feed, config, device, request.overrides)
    require_layers(kind_of_block, config, blocks)
    notes = require_scales(kind_of_block, config)
    mix = _mix(request, list_name, kind_of_block, unfinished, tokens, choosing)
    plans = [narrowed(kind, held) for kind, held in zip(kind_of_block, mix.blocks, strict=True)]
    quantized = {
        skeleton.keys[f"{list_name}.{i}.{name}.weight"]: (linears[name], setting)
        for i, linears in enumerate(map(linears_of, blocks))
        for name, setting in mix.blocks[i].items()
    }
    layers = {key.removesuffix(".weight"): setting for key, (_, setting) in quantized.items()}
    files = plan_files(skeleton, list_name, quantized, config, request.max_shard_bytes)
    if files.unused:
        first, count = files.unused[0], len(files.unused)
        notes.append(f"{count} tensors the model does not use are carried over ({first} …)")
    hidden_bytes = sum(tensor.nbytes for tensor in feed.hidden)
    around = surrounding_bytes(skeleton, list_name, feed.has_images)
    plan = Plan(
        model=str(skeleton.reader.folder),
        architecture=type(skeleton.model).__name__,
        calibration=request.calibration.describe(),
        blocks=len(blocks),
        kinds=[kind.describe([i for i, k in enumerate(kind_of_block) if k is kind]) for kind in kinds],
        quantized=list(layers),
        skipped=left_float(skeleton, list_name, plans),
        output_bytes=files.bytes,
        disk_bytes=files.bytes + 2 * (hidden_bytes + feed.followed_bytes),
        peak_bytes=predict_peak(
            blocks,
            kind_of_block,
            feed.batch_tokens,
            around,
            hidden_bytes,
            feed.followed_bytes,
            bool(config.tune),
        ),
        device=str(device),
        batch_tokens=feed.batch_tokens,
        resumed_at=len(unfinished.blocks) if unfinished is not None else 0,
        mix={"bits": mix.bits, "layers": layers} if config.target_bits is not None else None,
    )
    return Job(list_name, blocks, plans, mix, feed, files, layers, notes, plan)


def _share_followed(config: QuantConfig) -> int:
    """One of so many samples goes through the quantized blocks as well; 0 for none."""
    if config.tune:
        return 1
    corrects = config.correction and config.method == "awq" and config.format != "folded"
    return _FOLLOWED if corrects else 0


def _mix(
    request: Request,
    list_name: str,
    kinds: list[KindPlan],
    unfinished: Journal | None,
    batch_tokens: int,
    choosing: Callable[[], AbstractContextManager[None]],
) -> Mix:
    """What each layer is quantized to: under a budget, by a pass of its own over all blocks."""
    config, skeleton, device = request.config, request.skeleton, request.device
    if config.target_bits is None:
        return Mix([dict.fromkeys(kind.layers, config.setting) for kind in kinds], float(config.bits))
    if unfinished is not None and unfinished.mix is not None:
        return Mix.from_dict(unfinished.mix)
    with choosing():
        while True:
            feed = Feed(skeleton, list_name, request.calibration.samples, batch_tokens, device)
            try:
                units = measure_model(skeleton, list_name, kinds, feed, config, device)
                return choose(units, config.target_bits)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                feed.smaller()
                batch_tokens = feed.batch_tokens

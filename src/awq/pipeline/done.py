"""A block that is done: what was computed for it, and its tensors as they go to disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from awq.config import PLAIN_FORMATS, QuantConfig, Setting
from awq.formats import get_format
from awq.model import Skeleton
from awq.model.invariance import Proof
from awq.pipeline.block import BlockResult, report_of
from awq.pipeline.finish import cast
from awq.pipeline.observe import Seen, coverage_of
from awq.pipeline.preflight import Files
from awq.weight import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Done:
    """What was computed for a block.

    Args:
        result: its codes.
        seen: what it saw.
        proofs: of its folds.
        stored: dtype on disk of each of its parameters.
        hidden: hidden states behind it.
        quantized: those of the samples that are followed, behind the quantized block; None where nobody asks.
        own_error: what the codes' error is on the block's original inputs.
    """

    result: BlockResult
    seen: Seen
    proofs: list[Proof]
    stored: dict[str, torch.dtype]
    hidden: list[torch.Tensor]
    quantized: list[torch.Tensor] | None
    own_error: float

    @property
    def dropped(self) -> dict[str, float]:
        """Folds that did not hold, with the change they make."""
        return {proof.fold.source: proof.change for proof in self.proofs if not proof.holds}

    def outcome(self) -> dict[str, Any]:
        """The block's entry in the report."""
        out = report_of(self.result) | {"own_error": self.own_error, "dropped_folds": self.dropped}
        return out | ({"experts": coverage_of(self.seen.coverage)} if self.seen.coverage else {})


def tensors_of(
    block: nn.Module,
    name: str,
    done: Done,
    settings: Mapping[str, Setting],
    config: QuantConfig,
    skeleton: Skeleton,
    files: Files,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The block's tensors as they go to disk, under their names in the checkpoint.

    Args:
        block: the float weights that the codes stand for in place.
        name: in the model.
        settings: bits and group size of each quantized layer.
    """
    return _with_fused(_apart(block, name, done, settings, config, skeleton), skeleton, files)


def _apart(
    block: nn.Module,
    name: str,
    done: Done,
    settings: Mapping[str, Setting],
    config: QuantConfig,
    skeleton: Skeleton,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of its own, experts one by one."""
    layout = get_format(config.format, not config.zero_point)
    plain = config.format in PLAIN_FORMATS
    result, stored = done.result, done.stored
    for parameter, value in block.named_parameters():
        key = skeleton.keys[f"{name}.{parameter}"]
        layer, _, leaf = parameter.rpartition(".")
        quantized = leaf == "weight" and layer in result.codes
        if quantized and config.format == "folded":
            clipped = skeleton.turned(key, result.clipped(layer, value.data, config))
            yield key, cast(clipped, stored[parameter], key)
        elif quantized:
            weight = QuantizedWeight(*result.codes[layer], settings[layer].bits).to("cpu")
            for suffix, tensor in layout.pack(weight).items():
                out = f"{key.removesuffix('weight')}{suffix}"
                if plain:
                    tensor = cast(skeleton.turned(key, tensor), stored[parameter], out)
                yield out, tensor
        else:
            yield key, cast(skeleton.turned(key, value.data), stored[parameter], key)
    for buffer, held in block.named_buffers():
        if f"{name}.{buffer}" in skeleton.keys:
            yield skeleton.keys[f"{name}.{buffer}"], held


def _with_fused(
    tensors: Iterator[tuple[str, torch.Tensor]], skeleton: Skeleton, files: Files
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, slices of what the checkpoint keeps fused put together again."""
    views = skeleton.reader.views
    whole: dict[str, torch.Tensor] = {}
    for key, tensor in tensors:
        if key not in views or views[key].source not in files.fused:
            yield key, tensor
            continue
        source = views[key].source
        if source not in whole:
            whole[source] = torch.empty(files.fused[source].shape, dtype=files.dtypes[source])
        views[key].place(whole[source], tensor.cpu())
    yield from whole.items()

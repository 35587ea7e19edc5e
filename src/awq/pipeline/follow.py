"""Following the quantized model: what a block's layers see behind those that are quantized already.

A share of the calibration samples goes through the blocks twice, as the original blocks and as the quantized
ones give them. Layers of a block are rounded in the order they run. One whose output is added to the hidden
states is changed before that, so that it makes up for what those before it, in this block and in others, have
left wrong in the sum (`awq.search.drift`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awq.model.experts import only_tokens
from awq.model.sums import Sum
from awq.pipeline.observe import Batch
from awq.pipeline.stacks import holding
from awq.search import Codes, DriftAccumulator

# Widest input whose layer is corrected: its sums are held whole.
_WIDEST = 20480


class Follower:
    """Corrects weights of a block, layer after layer.

    Args:
        block: float32, its weights in place, folded as the codes will be.
        sums: where layers' outputs are added up.
        batches: inputs as the quantized blocks before give them.
        wanted: for each sum's reader what the original has there, batch by batch, `[…, width]`.
        device: where the block is.
    """

    def __init__(
        self,
        block: nn.Module,
        sums: Mapping[str, Sum],
        batches: Sequence[Batch],
        wanted: Mapping[str | None, Sequence[Tensor]],
        device: torch.device,
    ) -> None:
        self._block, self._sums, self._device = block, sums, device
        self._batches, self._wanted = batches, wanted
        self._tokens = sum(batch.tokens for batch in batches)

    def __call__(self, layers: Sequence[str], codes: Mapping[str, Codes], weight: Tensor) -> Tensor:
        """The corrected weight.

        Args:
            layers: they read the same input; one that does so alone may be corrected.
            codes: of the layers that are rounded already.
            weight: float32 `[out, in]`, that of `layers`, one below the other.
        """
        name, (out, channels) = layers[0], weight.shape
        if len(layers) > 1 or name not in self._sums or not channels <= min(self._tokens, _WIDEST):
            return weight
        place = self._sums[name]
        drift = DriftAccumulator(out, channels, self._device)
        with holding(self._block, codes):
            for batch, wanted in zip(self._batches, self._wanted[place.reader], strict=True):
                inputs, there = self._seen(name, place.reader, batch)
                missing = (wanted.to(self._device).view_as(there) - there).view(-1, out) / place.factor
                if batch.mask is not None:
                    keep = batch.mask.to(self._device).reshape(-1)
                    missing, inputs = missing[keep], inputs[keep]
                drift.add(missing, inputs)
        return weight + drift.correction()

    def _seen(self, name: str, reader: str | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs of a layer as rows, and the sum behind it. The block runs no further than to there."""
        seen: dict[str | None, Tensor] = {}
        keep = None if batch.mask is None else batch.mask.to(self._device)
        with ExitStack() as stack:
            for place in (name, reader):
                if place is not None:
                    hook = partial(_note, seen, place, place == reader)
                    module = self._block.get_submodule(place)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(only_tokens(self._block, keep))
            try:
                output = batch.run(self._block, self._device)
                seen[None] = output
            except _Enough:
                pass
        return seen[name].flatten(0, -2), seen[reader].contiguous()


class _Enough(Exception):  # noqa: N818 - no error
    """Everything that was asked for has been seen."""


def _note(
    seen: dict[str | None, Tensor], place: str, last: bool, module: nn.Module, args: Any, kwargs: Any
) -> None:
    """Keep the first tensor that a module is given."""
    seen[place] = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if last:
        raise _Enough

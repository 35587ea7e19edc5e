"""Following the quantized model: what a block's layers see behind those that are quantized already.

A share of the calibration samples goes through the blocks twice, as the original blocks and as the quantized
ones give them. Layers of a block are rounded in the order they run, each corrected for what the ones before,
in this block and in those before it, have left wrong (`awq.search.drift`): in its own input, or, where its
output is added to the hidden states, in the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from awq.model.experts import expert_names, only_tokens
from awq.model.sums import Sum
from awq.pipeline.observe import Batch
from awq.pipeline.stacks import holding
from awq.search import Codes, DriftAccumulator

# Widest input that is corrected: its sums are held whole.
_WIDEST = 20480


class Follower:
    """Corrects weights of a block, layer after layer.

    Args:
        block: float32, its weights in place, folded as the codes will be.
        sums: where layers' outputs are added up.
        batches: the block's original inputs.
        drifted: the same samples as the quantized blocks before give them.
        outputs: the block's original outputs.
        device: where the block is.
    """

    def __init__(
        self,
        block: nn.Module,
        sums: Mapping[str, Sum],
        batches: Sequence[Batch],
        drifted: Sequence[Batch],
        outputs: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self._block, self._sums, self._device = block, sums, device
        self._samples = list(zip(batches, drifted, outputs, strict=True))
        self._experts = expert_names(block)
        self._tokens = sum(batch.tokens for batch in batches)

    def __call__(self, layers: Sequence[str], codes: Mapping[str, Codes], weight: Tensor) -> Tensor:
        """The corrected weight.

        Args:
            layers: they read the same input.
            codes: of the layers that are rounded already.
            weight: float32 `[out, in]`, that of `layers`, one below the other.
        """
        name, channels = layers[0], weight.shape[1]
        # Experts see a choice of the tokens, and not the same one behind quantized layers.
        if name in self._experts or channels > _WIDEST or self._tokens < channels:
            return weight
        place = self._sums.get(name) if len(layers) == 1 else None
        drift: DriftAccumulator | None = None
        for batch, drifted, output in self._samples:
            wanted = self._wanted(name, place, batch, output)
            with holding(self._block, codes):
                inputs, there = self._seen(name, place, drifted)
            missing = wanted - (inputs if place is None else there)
            if place is not None:
                missing /= place.factor
            keep = None if batch.mask is None else batch.mask.to(self._device).reshape(-1)
            if keep is not None and len(keep) == len(inputs):
                missing, inputs = missing[keep], inputs[keep]
            if drift is None:
                drift = DriftAccumulator(missing.shape[1], channels, place is None, self._device)
            drift.add(missing, inputs)
        return weight if drift is None else drift.finish().corrected(weight)

    def _wanted(self, name: str, place: Sum | None, batch: Batch, output: Tensor) -> Tensor:
        """What the float block has where the quantized one shall have it, `[tokens, features]`."""
        if place is not None and place.reader is None:
            return output.to(self._device).flatten(0, -2)
        return self._seen(name, place, batch)[0 if place is None else 1]

    def _seen(self, name: str, place: Sum | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """Inputs of a layer and the sum behind it, as rows; the input twice where there is no sum.

        The block runs no further than to the later one.
        """
        last = name if place is None else place.reader
        seen: dict[str, Tensor] = {}

        def note(module: nn.Module, args: Any, kwargs: Any, key: str) -> None:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            seen[key] = given.reshape(-1, given.shape[-1])
            if key == last:
                raise _Enough

        keep = None if batch.mask is None else batch.mask.to(self._device)
        with ExitStack() as stack:
            for key in {name, last} - {None}:
                hook = self._block.get_submodule(str(key)).register_forward_pre_hook(
                    _named(note, str(key)), with_kwargs=True
                )
                stack.callback(hook.remove)
            stack.enter_context(only_tokens(self._block, keep))
            try:
                output = batch.run(self._block, self._device)
                seen["the output"] = output.reshape(-1, output.shape[-1])
            except _Enough:
                pass
        return seen[name], seen["the output" if last is None else last]


class _Enough(Exception):  # noqa: N818 - no error
    """Everything that was asked for has been seen."""


def _named(note: Any, key: str) -> Any:
    return lambda module, args, kwargs: note(module, args, kwargs, key)

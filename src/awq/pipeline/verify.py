"""The saved checkpoint beside the original, block by block, so that neither is ever whole in memory.

Both streams go through the same modules: a block's original weights are loaded and run, then the values that
the saved codes stand for. So what is judged is what is on disk, packed and written, not what was meant to be.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from awq.calibration import HeldOut
from awq.errors import StructureError
from awq.evaluate.divergence import Divergence, Tally, differences
from awq.evaluate.windows import Window, batches
from awq.model import Skeleton, dry_pass
from awq.model.around import outside
from awq.model.saved import saved_as
from awq.model.tail import Tail
from awq.pipeline.block import make_judge
from awq.pipeline.memory import give_back
from awq.pipeline.observe import Batch
from awq.pipeline.precision import matmul_precision

# Windows run at once; a block's own error is taken from the first so many.
_WINDOWS_AT_ONCE = 4
# Most logits at once (float32: 16 MB), but never fewer rows than pay for reading the output layer.
_LOGITS, _FEWEST_ROWS = 1 << 22, 64


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a comparison found.

    Args:
        divergence: over all windows; None where there are no finite logits to compare.
        blocks: for each block its name, its own `error` (mean squared, relative to the block's own update, on
            what the original blocks before give it), and the `drift` of the hidden states behind it (mean
            squared, relative to the states) since the first block.
        broken: where the saved checkpoint gives NaN or infinity; None if it does not.
    """

    divergence: Divergence | None
    blocks: list[dict[str, float | str]]
    broken: str | None = None


class _Stream:
    """Hidden states of all batches, on their way through one of the two models."""

    def __init__(
        self, skeleton: Skeleton, list_name: str, inputs: Sequence[Tensor], device: torch.device
    ) -> None:
        self.skeleton, self._device = skeleton, device
        self._passes = dry_pass(skeleton, list_name, [{"input_ids": ids} for ids in inputs], device)
        self.hidden = [item.hidden for item in self._passes]
        self.more = self._passes[0].more

    def at(self, index: int) -> list[Batch]:
        """The batches in front of a block."""
        calls = [item.calls[index] for item in self._passes]
        return [Batch(hidden, call, None) for hidden, call in zip(self.hidden, calls, strict=True)]

    def step(self, block: nn.Module, index: int) -> None:
        """Take all batches through a block, whose weights are in place."""
        self.hidden = [batch.run(block, self._device, keep=True).cpu() for batch in self.at(index)]

    def is_finite(self) -> bool:
        """Whether no state is NaN or infinite."""
        return all(bool(torch.isfinite(hidden).all()) for hidden in self.hidden)


@torch.no_grad()
def compare_saved(
    skeleton: Skeleton, list_name: str, out: Path, text: HeldOut, device: torch.device
) -> Measured:
    """Compare a saved checkpoint with the model it was made from.

    Args:
        skeleton: the original, opened.
        list_name: its list of blocks.
        out: the checkpoint.
        text: windows to run.
        device: where the work is done.

    Raises:
        StructureError: the model cannot be run block by block on this text, or is not finite on it itself.
        CorruptFileError: the checkpoint lacks a tensor, or cannot be read.
    """
    parts = list(batches([Window(ids, 1) for ids in text.ids], _WINDOWS_AT_ONCE))
    inputs = [ids for ids, _ in parts]
    saved = saved_as(skeleton, out)
    blocks: list[dict[str, float | str]] = []
    with matmul_precision("highest"):
        original, ours = (_Stream(each, list_name, inputs, device) for each in (skeleton, saved))
        for index, block in enumerate(skeleton.model.get_submodule(list_name).children()):
            name = f"{list_name}.{index}"
            skeleton.load(block, name, device)
            before = original.at(index)[:1]
            original.step(block, index)
            saved.load(block, name, device)
            judge = make_judge(block, _masked(before, parts), original.hidden[:1], device)
            error = judge()
            ours.step(block, index)
            skeleton.unload(block)
            if not original.is_finite():
                raise StructureError(f"the original model itself gives NaN or infinity in {name}")
            if not ours.is_finite():
                return Measured(None, blocks, name)
            blocks.append({"name": name, "error": error, "drift": _drift(ours, original, parts)})
            give_back()
        tally = _tally(original, ours, list_name, parts, device)
    result = tally.result(text.window, text.window)
    finite = math.isfinite(result.kl) and math.isfinite(result.rise)
    return Measured(result, blocks) if finite else Measured(None, blocks, "the output layer")


def _masked(states: list[Batch], parts: Sequence[tuple[Tensor, Tensor]]) -> list[Batch]:
    """The same batches, with a mask that leaves out padding (and each window's last token)."""
    return [
        dataclasses.replace(batch, mask=nn.functional.pad(scored, (0, 1)))
        for batch, (_, scored) in zip(states, parts, strict=False)
    ]


def _drift(ours: _Stream, original: _Stream, parts: Sequence[tuple[Tensor, Tensor]]) -> float:
    """How far the states of both are apart, |ours - original|² / |original|²."""
    apart = size = 0.0
    for one, other, (_, scored) in zip(ours.hidden, original.hidden, parts, strict=True):
        keep = scored.unsqueeze(-1)
        apart += float(((one - other)[..., :-1, :] * keep).double().square().sum())
        size += float((other[..., :-1, :] * keep).double().square().sum())
    return apart / max(size, 1e-300)


def _tally(
    original: _Stream,
    ours: _Stream,
    list_name: str,
    parts: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
) -> Tally:
    """Predictions of both, compared for a few rows at a time."""
    skeleton, saved, more = original.skeleton, ours.skeleton, original.more
    tally = Tally()
    with contextlib.ExitStack() as both:
        if _same_around(skeleton, saved, list_name):
            first = second = both.enter_context(Tail(skeleton, list_name, device, more))
        else:
            # A copy of the modules, which have no weights at this time, for those that differ.
            apart = dataclasses.replace(saved, model=copy.deepcopy(saved.model))
            first = both.enter_context(Tail(skeleton, list_name, device, more))
            second = both.enter_context(Tail(apart, list_name, device, more))
        rows = max(_FEWEST_ROWS, _LOGITS // skeleton.vocabulary)
        for (ids, scored), other, own in zip(parts, original.hidden, ours.hidden, strict=True):
            values = torch.empty(4, *scored.shape)
            for windows, tokens in _pieces(scored.shape[0], scored.shape[1], rows):
                here = (..., windows, tokens, slice(None))
                target = first.logits(ids[windows, tokens], other[here]).log_softmax(-1)
                logs = second.logits(ids[windows, tokens], own[here]).log_softmax(-1)
                following = ids[:, 1:][windows, tokens].to(logs.device)
                values[:, windows, tokens] = differences(logs, target, following).cpu()
            tally.add(values, scored)
    return tally


def _pieces(windows: int, tokens: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Cuts of `[windows, tokens]` with about `rows` tokens each: several windows, or a part of one."""
    several = max(1, rows // tokens)
    for window in range(0, windows, several):
        for token in range(0, tokens, rows):
            yield slice(window, window + several), slice(token, min(token + rows, tokens))


def _same_around(original: Skeleton, saved: Skeleton, list_name: str) -> bool:
    """Whether a checkpoint holds the very values of the original around the blocks, embeddings left aside."""
    keys = {
        original.keys[f"{name}.{tensor}".lstrip(".")]
        for name, module in outside(original.model, list_name, head=True)
        for tensor in module._parameters
        if not isinstance(module, nn.Embedding) and f"{name}.{tensor}".lstrip(".") in original.keys
    }
    for key in sorted(keys):
        there, here = original.reader.tensors[key], saved.reader.tensors.get(key)
        if here is None or here.dtype != there.dtype:
            return False
        # In the stored dtype: two output layers are as much as there will be of them in memory.
        if not torch.equal(original.reader.read_one(key), saved.reader.read_one(key)):
            return False
    return True

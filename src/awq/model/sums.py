"""Where the output of a layer is added to what the block carries on: found by experiment, not by name.

A layer is given a random addition to its output. Where the input of a later module, or the block's output,
changes by exactly that addition (or by a constant multiple of it), the layer's output is one term of a sum
there, and whatever else is wrong in the sum can be put right by that layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from awq.model.experts import expert_names
from awq.model.layers import linears_of

# The most by which a change may differ from a multiple of the addition, relative to it.
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum with a layer's output as one term, or as the only one.

    Args:
        reader: the module whose input it is; None for the block's output.
        factor: what the layer's output is multiplied by there.
    """

    reader: str | None
    factor: float


def find_sums(block: nn.Module, layers: Collection[str], run: Callable[[], Tensor]) -> dict[str, Sum]:
    """The last sum that each layer's output is a plain term of; no entry where there is none.

    Args:
        block: its weights in place.
        layers: linear layers of it. Those of experts, which see a choice of the tokens, have no entry.
        run: runs the block on a probe and gives its output `[…, width]`.
    """
    with torch.no_grad():
        before = _inputs(block, run)
        width, size = before[None].shape[-1], before[None].numel()
        linears, within = linears_of(block), expert_names(block)
        found = {}
        for number, name in enumerate(layers):
            if name in within or linears[name].out_features != width:
                continue
            with _added(linears[name], number) as addition:
                after = _inputs(block, run)
            if len(addition) != 1 or addition[0].numel() != size:
                continue
            factors = {
                reader: _multiple(after[reader] - value, addition[0])
                for reader, value in before.items()
                if reader in after and value.numel() == after[reader].numel() == size
            }
            sums = [Sum(reader, factor) for reader, factor in factors.items() if factor is not None]
            if sums:
                found[name] = sums[-1]
    return found


def _inputs(block: nn.Module, run: Callable[[], Tensor]) -> dict[str | None, Tensor]:
    """First argument of each module that runs once, in the order they run, and the block's output last."""
    seen: dict[str | None, Tensor] = {}
    often: set[str] = set()
    with ExitStack() as stack:
        for name, module in block.named_modules():

            def hook(module: nn.Module, args: Any, name: str = name) -> None:
                if args and isinstance(args[0], Tensor):
                    often.update({name} & seen.keys())
                    seen[name] = args[0].detach()

            if name:
                stack.callback(module.register_forward_pre_hook(hook).remove)
        output = run()
    return {name: value for name, value in seen.items() if name not in often} | {None: output}


@contextmanager
def _added(linear: nn.Module, seed: int) -> Iterator[list[Tensor]]:
    """Within a `with` block the layer's output has a random addition as large as itself, kept in a list."""
    additions: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(output.shape, generator=generator).to(output)
        additions.append(noise * output.square().mean().sqrt())
        return output + additions[-1]

    handle = linear.register_forward_hook(hook)
    try:
        yield additions
    finally:
        handle.remove()


def _multiple(change: Tensor, addition: Tensor) -> float | None:
    """The factor with which `change` is `addition`, as large; None if it is no multiple of it."""
    change, addition = change.reshape(-1).double(), addition.reshape(-1).double()
    square = float(addition @ addition)
    factor = float(change @ addition) / square if square > 0 else 0.0
    rest = change - factor * addition
    exact = abs(factor) > _TOLERANCE and float(rest @ rest) <= (_TOLERANCE * factor) ** 2 * square
    return factor if exact else None

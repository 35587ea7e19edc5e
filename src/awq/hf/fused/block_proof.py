"""Decoder blocks that one call of C++ can do for, found by proof, not by name.

Such a block is a module that holds two norms, attention (`attention_proof`) and three layers around a gate,
as `awq.kernels.cpu_block` puts them together. Which is which is tried out as it is for attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awq.hf.fused import attention_proof
from awq.hf.fused.attention_proof import REFUSALS, agrees, in_dtype, joined, kernel_of, norms_among
from awq.hf.fused.gates import Rule as GateRule
from awq.hf.fused.gates import rule_of as gate_rule_of
from awq.kernels.cpu_block import Around, Attention, CpuBlock, Norm
from awq.nn import QuantLinear


class Pieces(NamedTuple):
    """The modules that make up a block."""

    block: Any
    norms: list[Norm]
    attention: attention_proof.Pieces
    feed_forward: Any
    gate: GateRule


def pieces_of(module: nn.Module, dtype: torch.dtype) -> Pieces | None:
    """The modules that make up a block, if a module is built like one."""
    children = dict(module.named_children())
    if len(children) != 4 or module._parameters or "forward" in module.__dict__:
        return None
    norms, others = norms_among(children, dtype)
    if len(norms) != 2:
        return None
    gates = {name: rule for name, child in others.items() if (rule := gate_rule_of(child, dtype)) is not None}
    if len(gates) != 1:
        return None
    ((mlp, gate),) = gates.items()
    attention = attention_proof.pieces_of(next(child for name, child in others.items() if name != mlp), dtype)
    feed_forward: Any = others[mlp]
    gate_layer, up_layer = (feed_forward.get_submodule(name) for name in (gate.gate, gate.up))
    if attention is None or gate_layer._merge is None:
        return None
    if {*gate_layer._merge.members} != {gate_layer, up_layer}:
        return None
    layers = [child for child in feed_forward.children() if isinstance(child, QuantLinear)]
    if kernel_of(layers) is not attention.kernel:
        return None
    return Pieces(module, norms, attention, feed_forward, gate)


@torch.no_grad()
def proved(found: Pieces) -> tuple[Attention, Around] | None:
    """How the pieces go together, if ours then does what the module does."""
    dtype, kernel = found.attention.dtype, found.attention.kernel

    def run(x: Tensor, **rest: Any) -> Any:
        return type(found.block).forward(found.block, x, **rest)

    for attention, around in itertools.product(
        attention_proof.candidates(found.attention), _candidates(found)
    ):
        try:
            if all(
                agrees(
                    run,
                    CpuBlock(in_dtype(attention, each), in_dtype(around, each), each, kernel.digits(each)),
                    found.attention,
                )
                for each in {torch.float32, dtype}
            ):
                return attention, around
        except REFUSALS:
            continue  # a module that takes something else
    return None


def _candidates(found: Pieces) -> Iterator[Around]:
    """All ways to put together what is around the attention."""
    members, dtype = found.feed_forward._modules, found.attention.dtype
    gate, up = (members[name] for name in (found.gate.gate, found.gate.up))
    wide, down = joined(gate._merge.members, dtype), joined((members[found.gate.down],), dtype)
    for first, second in itertools.permutations(found.norms):
        yield Around(first, second, wide, down, (gate._rows.start, up._rows.start), found.gate.activation)

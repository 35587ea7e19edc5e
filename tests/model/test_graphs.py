"""Random blocks: whatever is proved keeps the output, whatever is bent is refused, and nothing slips through.

A block is drawn as a chain of branches on a residual stream: norms of any rule, fused and split layers,
gates, activations, scaled residuals; and leaks: consumers of a normed tensor that are no linear layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from awq.model.groups import propose
from awq.model.invariance import TOLERANCE, Proof, apply, prove
from awq.model.layers import Fold

WIDTH = 32


class AnyNorm(nn.Module):
    """RMS or layer norm; `w` or `1 + w`; with a bias or none; a name of its own for the vectors."""

    def __init__(self, centred: bool, offset: bool, bias: bool, named: bool) -> None:
        super().__init__()
        self.names = ("gain", "shift") if named else ("weight", "bias")
        self.centred, self.offset = centred, float(offset)
        self.register_parameter(self.names[0], nn.Parameter(torch.randn(WIDTH) * 0.4 + 1 - self.offset))
        self.register_parameter(self.names[1], nn.Parameter(torch.randn(WIDTH)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        gain, shift = (self._parameters[name] for name in self.names)
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        assert gain is not None
        x = x * (gain + self.offset)
        return x if shift is None else x + shift


class Branch(nn.Module):
    """A norm, and what reads it; added to the stream it came from.

    `body` says what lies between the layers, `leak` who else reads the norm's output.
    """

    def __init__(
        self, norm: tuple[bool, bool, bool, bool] | None, body: str, leak: str, factor: float
    ) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else AnyNorm(*norm)
        self.body, self.leak, self.factor = body, leak, factor
        self.up, self.gate = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.fused = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.router = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.body == "split gate":
            inner = F.silu(self.gate(y)) * self.up(y)
        elif self.body == "fused gate":
            first, second = self.fused(y).chunk(2, -1)
            inner = first.tanh() * second
        elif self.body == "turns":
            inner = self.fused(y)[..., 0::2] * self.fused(y)[..., 1::2].sigmoid()
        elif self.body == "relu":
            inner = self.up(y).relu()
        elif self.body == "squared":
            inner = self.up(y).relu().square()
        elif self.body == "gelu":
            inner = F.gelu(self.up(y))
        else:
            inner = self.up(y).roll(1, -2) + self.gate(y)
        out = self.down(inner) * self.factor
        if self.leak == "residual":
            out = out + y / 4
        elif self.leak == "router":
            out = out * (y @ self.router.t()).softmax(-1)[..., :1]
        elif self.leak == "shape":
            out = out + F.linear(y, self.up.weight[:WIDTH])
        return out


class Graph(nn.Module):
    """Branches one after another; or all in parallel behind one norm's stream."""

    def __init__(self, branches: list[Branch], parallel: bool) -> None:
        super().__init__()
        # Not a list: alike members of one would count as experts.
        for number, branch in enumerate(branches):
            self.add_module(f"branch{number}", branch)
        self.parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return x + torch.stack([branch(x) for branch in self.children()]).sum(0)
        for branch in self.children():
            x = x + branch(x)
        return x


BODIES = ["split gate", "fused gate", "turns", "relu", "squared", "gelu", "mixed"]
LEAKS = ["none", "none", "residual", "router", "shape"]
# Whether the layer in front of `down` acts on it channel by channel.
FACTORS = {"split gate", "fused gate", "turns", "relu", "squared"}
norms = st.one_of(st.none(), st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()))
branches = st.tuples(norms, st.sampled_from(BODIES), st.sampled_from(LEAKS), st.sampled_from([1.0, 0.25]))


def drawn(parts: list[Any], parallel: bool, seed: int) -> tuple[Graph, list[Proof]]:
    """A block of the parts, and what was proposed for it, with its proofs."""
    torch.manual_seed(seed)
    block = Graph([Branch(*part) for part in parts], parallel)
    long, single = torch.randn(2, 10, WIDTH), torch.randn(16, 1, WIDTH)
    with torch.no_grad():
        structure = propose(block, lambda: block(long), lambda: block(single))
        return block, prove(block, structure.folds, lambda: block(long))


graphs = given(st.lists(branches, min_size=1, max_size=3), st.booleans(), st.integers(0, 3))


@graphs
@settings(max_examples=40)
def test_all_that_is_proved_keeps_the_output(parts: list[Any], parallel: bool, seed: int) -> None:
    block, proofs = drawn(parts, parallel, seed)
    fresh = torch.randn(4, 7, WIDTH)
    with torch.no_grad():
        before = block(fresh)
        for proof in proofs:
            if proof.holds:
                apply(block, proof.fold, torch.rand(len(proof.fold.rows)) * 3 + 0.2)
        assert float((block(fresh) - before).abs().max() / before.abs().max()) < 10 * TOLERANCE


@graphs
@settings(max_examples=40)
def test_what_can_be_folded_is_found_and_what_leaks_is_not(
    parts: list[Any], parallel: bool, seed: int
) -> None:
    _, proofs = drawn(parts, parallel, seed)
    held = {proof.fold.producer for proof in proofs if proof.holds}
    for number, (norm, body, leak, _) in enumerate(parts):
        path = f"branch{number}"
        # That leak reads the weight of `up`, which makes up for the scale where `up` itself reads the norm.
        sound = leak == "none" or (leak == "shape" and body not in ("fused gate", "turns"))
        assert (f"{path}.norm" in held) == (norm is not None and sound)
        behind = {f"{path}.up", f"{path}.gate", f"{path}.fused"}
        # The same leak shows whatever is done to the rows of `up`.
        taken = leak == "shape" and body in ("split gate", "relu", "squared")
        assert bool(behind & held) == (body in FACTORS and not taken)


@graphs
@settings(max_examples=25)
def test_what_is_bent_is_refused(parts: list[Any], parallel: bool, seed: int) -> None:
    block, proofs = drawn(parts, parallel, seed)
    x = torch.randn(2, 10, WIDTH)
    for proof in proofs:
        if not proof.holds:
            continue
        fold = proof.fold
        bent = [dataclasses.replace(fold, tie=fold.tie.roll(1))]
        bent += [dataclasses.replace(fold, consumers=fold.consumers[:-1])]
        if fold.rule != "factor":
            bent += [dataclasses.replace(fold, rule="factor")]
        for wrong in bent:
            with torch.no_grad():
                assert not prove(block, [wrong], lambda: block(x))[0].holds, _told(wrong)


def _told(fold: Fold) -> str:
    return f"{fold.source} -> {fold.consumers} by {fold.rule}"

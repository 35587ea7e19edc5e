"""Discovery and proof of folds, on real architectures and on modules that resemble none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from awq.model import dry_pass, find_blocks, open_model
from awq.model.blocks import BlockCall, kind_of
from awq.model.groups import propose
from awq.model.invariance import TOLERANCE, apply, prove
from awq.model.layers import Fold
from awq.pipeline.observe import Batch


def folds_of(block: nn.Module, width: int = 64) -> tuple[dict[str, Fold], list[float]]:
    """Proved folds by first consumer, and every proof's change."""
    generator = torch.Generator().manual_seed(0)
    long = torch.randn(2, 12, width, generator=generator)
    single = torch.randn(16, 1, width, generator=generator)
    with torch.no_grad():
        structure = propose(block, lambda: block(long), lambda: block(single))
        proofs = prove(block, structure.folds, lambda: block(long))
    held = {proof.fold.consumers[0]: proof.fold for proof in proofs if proof.holds}
    return held, [proof.change for proof in proofs]


class Norm(nn.Module):
    """A norm with either rule, and optionally a bias."""

    def __init__(self, width: int, one_plus: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.3 + (0.0 if one_plus else 1.0))
        self.bias = nn.Parameter(torch.randn(width)) if bias else None
        self.offset = 1.0 if one_plus else 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.weight + self.offset)
        return x if self.bias is None else x + self.bias


class Odd(nn.Module):
    """A block of our own: fused and interleaved k/v/q, grouped queries, a fused gate and up, odd names."""

    def __init__(self, width: int = 64, heads: int = 4, kv: int = 2, one_plus: bool = False) -> None:
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, width // heads
        self.before, self.after = Norm(width, one_plus, bias=True), Norm(width, one_plus)
        self.mixed = nn.Linear(width, (heads + 2 * kv) * self.size)
        self.back = nn.Linear(width, width)
        self.wide = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        per = self.heads // self.kv
        mixed = self.mixed(self.before(x)).view(b, t, self.kv, per + 2, self.size)
        k, v, q = mixed[..., 0, :], mixed[..., 1, :], mixed[..., 2:, :]
        k, v = (z.repeat_interleave(per, dim=2).transpose(1, 2) for z in (k, v))
        q = q.reshape(b, t, self.heads, self.size).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        x = x + self.back(mixed)
        wide = self.wide(self.after(x))
        return x + self.narrow(wide[..., 0::2] * torch.tanh(wide[..., 1::2]))


@pytest.mark.parametrize("one_plus", [False, True])
def test_a_block_nobody_listed_is_understood_whole(one_plus: bool) -> None:
    torch.manual_seed(0)
    folds, _ = folds_of(Odd(one_plus=one_plus))
    assert {name: fold.producer for name, fold in folds.items()} == {
        "mixed": "before",
        "back": "mixed",
        "wide": "after",
        "narrow": "wide",
    }
    assert folds["mixed"].rule == ("one_plus" if one_plus else "factor")
    # Rows of v: for each of two kv heads, the second of its four slots of 16.
    expected = torch.cat([torch.arange(16, 32), torch.arange(80, 96)])
    assert torch.equal(folds["back"].rows, expected)
    assert torch.equal(folds["back"].tie.view(4, 16)[0], folds["back"].tie.view(4, 16)[1])
    assert torch.equal(folds["narrow"].rows, torch.arange(0, 256, 2))


class Squared(nn.Module):
    """ReLU², as some models have it: a factor in front is its square behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = Norm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))).square())


def test_a_scale_passes_through_a_square_as_its_root() -> None:
    torch.manual_seed(0)
    folds, _ = folds_of(Squared())
    assert (folds["down"].producer, folds["down"].rule) == ("up", "square")
    assert len(folds["down"].rows) == 64


class Triple(nn.Module):
    """Three factors of one product, fused in one layer, with a convolution over time between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fused, self.out = Norm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.conv = nn.Conv1d(64, 64, 3, groups=64, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.fused(self.norm(x)).chunk(3, -1)
        mixed = self.conv((a * c).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return x + self.out(torch.tanh(mixed) * b)


def test_the_one_factor_among_three_fused_ones_is_found() -> None:
    torch.manual_seed(0)
    folds, _ = folds_of(Triple())
    assert torch.equal(folds["out"].rows, torch.arange(64, 128))


class Hidden(nn.Module):
    """A consumer that is no linear layer reads the norm's output: a router held as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = Norm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.router = nn.Parameter(torch.randn(4, 64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        weights = torch.softmax(y @ self.router.t(), -1)
        return x + self.down(F.relu(self.up(y))) * weights[..., :1]


def test_a_hidden_consumer_makes_the_proof_fail() -> None:
    torch.manual_seed(0)
    folds, changes = folds_of(Hidden())
    assert "up" not in folds
    assert max(changes) > 100 * TOLERANCE
    # ReLU passes positive factors: that fold is exact, and stays.
    assert folds["down"].producer == "up"


class Massive(Hidden):
    """One channel of the stream is so large that nothing seems to change beside it."""

    def forward(self, x: Tensor) -> Tensor:
        lift = torch.zeros(64)
        lift[5] = 1e6
        return super().forward(x) + lift


def test_a_massive_channel_does_not_hide_a_mistake() -> None:
    torch.manual_seed(0)
    folds, changes = folds_of(Massive())
    assert "up" not in folds
    assert max(changes) > 100 * TOLERANCE
    assert folds["down"].producer == "up"


class Lending(nn.Module):
    """Values that the block's own output layer reads, and that are also left for a later block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.value, self.out = Norm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        shared["value"] = value = self.value(self.norm(x))
        return x + self.out(value)


def test_what_a_block_leaves_for_later_ones_must_stay_as_it_was() -> None:
    torch.manual_seed(0)
    block = Lending()
    batch = Batch(torch.randn(2, 12, 64), BlockCall((), {"shared": {}}), None)
    single = Batch(torch.randn(16, 1, 64), BlockCall((), {"shared": {}}), None)
    cpu = torch.device("cpu")
    with torch.no_grad():
        structure = propose(block, lambda: batch.run(block, cpu), lambda: single.run(block, cpu))
        proofs = {p.fold.producer: p for p in prove(block, structure.folds, lambda: batch.whole(block, cpu))}
    assert proofs["norm"].holds
    assert proofs["value"].change > 100 * TOLERANCE


class Shifted(nn.Module):
    """Readers of one norm that see it mixed with the token before, each in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(64, bias=True)
        self.key, self.value, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.key_mix, self.value_mix = nn.Parameter(torch.rand(64)), nn.Parameter(torch.rand(64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        before = F.pad(y, (0, 0, 1, -1))
        key = self.key(y + (before - y) * self.key_mix)
        return x + self.out(key.sigmoid() * self.value(y + (before - y) * self.value_mix))


def test_readers_of_different_inputs_behind_one_producer_share_its_scale() -> None:
    torch.manual_seed(0)
    block = Shifted()
    x = torch.randn(2, 12, 64)
    with torch.no_grad():
        structure = propose(block, lambda: block(x), lambda: block(x.reshape(24, 1, 64)))
        proofs = prove(block, structure.folds, lambda: block(x))
    held = {proof.fold.producer: proof.fold for proof in proofs if proof.holds}
    assert held["norm"].consumers == ("key", "value")
    assert held["value"].consumers == ("out",)
    assert structure.inputs == {"key": ("key",), "value": ("value",), "out": ("out",)}


class Own(nn.Module):
    """A norm that calls its vectors as it likes, and a gain that is a parameter of the block itself."""

    class Level(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.shift = nn.Parameter(torch.rand(64) + 0.5), nn.Parameter(torch.randn(64))

        def forward(self, x: Tensor) -> Tensor:
            return x / x.abs().mean(-1, keepdim=True) * self.gain + self.shift

    def __init__(self) -> None:
        super().__init__()
        self.level, self.loose = self.Level(), nn.Parameter(torch.rand(64) + 0.5)
        self.up, self.out = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.up(self.level(x)))
        return x + self.out(torch.sin(x) * self.loose)


def test_vectors_of_any_name_take_a_scale() -> None:
    torch.manual_seed(0)
    block = Own()
    folds, _ = folds_of(block)
    assert (folds["up"].producer, folds["up"].weight, folds["up"].bias) == ("level", "gain", "shift")
    assert (folds["out"].producer, folds["out"].source) == ("", "loose")
    x = torch.randn(2, 12, 64)
    with torch.no_grad():
        reference = block(x)
        for fold in folds.values():
            apply(block, fold, torch.rand(len(fold.rows)) * 3 + 0.2)
        assert float((block(x) - reference).abs().max() / reference.abs().max()) < TOLERANCE


class Smooth(Hidden):
    """An activation that is no factor."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Listed(nn.Module):
    """Experts in a list, as older and foreign code keeps them; most get no token at all."""

    def __init__(self, width: int = 64, experts: int = 8, weighted: bool = False) -> None:
        super().__init__()
        self.norm, self.weighted = Norm(width), weighted
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))
        self.router.weight.data[3:] -= 10 * self.router.weight.data.abs().max() * self.norm.weight.sign()

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x).flatten(0, 1)
        out = torch.zeros_like(flat)
        scores, chosen = self.router(flat.abs() if self.weighted else flat).softmax(-1).topk(1)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero()[:, 0]
            out[rows] = self.experts[number](flat[rows]) * scores[rows]
        return x + out.view_as(x)


def test_experts_in_a_list_are_understood_although_few_of_them_run() -> None:
    torch.manual_seed(0)
    block = Listed()
    folds, changes = folds_of(block)
    assert max(changes) <= TOLERANCE
    norm = folds.pop("router")
    readers = {f"experts.{n}.{name}" for n in range(8) for name in ("gate", "up")}
    assert norm.producer == "norm" and set(norm.consumers) == readers | {"router"}
    assert {fold.producer: name for name, fold in folds.items()} == {
        f"experts.{n}.up": f"experts.{n}.down" for n in range(8)
    }


def test_a_router_that_reads_something_else_makes_the_proof_fail() -> None:
    torch.manual_seed(0)
    folds, _ = folds_of(Listed(weighted=True))
    assert not any(fold.producer == "norm" for fold in folds.values())


def test_nothing_is_folded_through_a_smooth_activation() -> None:
    torch.manual_seed(0)
    folds, _ = folds_of(Smooth())
    assert set(folds) == {"up"}


def test_a_wrong_rule_or_a_forgotten_consumer_is_caught() -> None:
    """Mutations of a right fold must not pass the proof."""
    torch.manual_seed(0)
    block = Odd()
    folds, _ = folds_of(block)
    x = torch.randn(2, 12, 64)
    right = folds["mixed"]
    shifted = Fold(right.producer, right.rule, right.rows, right.tie.roll(1), right.consumers)
    other_rule = Fold(right.producer, "one_plus", right.rows, right.tie, right.consumers)
    forgotten = Fold("wide", "factor", folds["narrow"].rows, folds["narrow"].tie, ())
    with torch.no_grad():
        for proof in prove(block, [shifted, other_rule, forgotten], lambda: block(x)):
            assert not proof.holds
        assert prove(block, [right], lambda: block(x))[0].holds


def test_proving_leaves_the_block_as_it_was_and_applying_keeps_its_output() -> None:
    torch.manual_seed(0)
    block = Odd()
    before = {name: p.clone() for name, p in block.named_parameters()}
    folds, _ = folds_of(block)
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
    x = torch.randn(2, 12, 64)
    with torch.no_grad():
        reference = block(x)
        for fold in folds.values():
            apply(block, fold, torch.rand(len(fold.rows)) * 3 + 0.2)
        assert not torch.equal(block.mixed.weight, before["mixed.weight"])
        assert float((block(x) - reference).abs().max() / reference.abs().max()) < TOLERANCE


def test_what_stands_in_front_of_an_input_without_a_fold_is_told() -> None:
    torch.manual_seed(0)
    block = Smooth()
    x = torch.randn(2, 12, 64)
    with torch.no_grad():
        structure = propose(block, lambda: block(x), lambda: block(x[:, :1]))
    assert structure.behind == {"down": "up"}


def test_blocks_that_differ_by_a_switch_alone_are_of_two_kinds() -> None:
    full, sliding, other = Smooth(), Smooth(), Smooth()
    full.layer_type, sliding.layer_type, other.layer_type = "full", "sliding", "full"
    full.layer_idx, other.layer_idx = 0, 2
    assert kind_of(full) == kind_of(other)
    assert kind_of(full) != kind_of(sliding)


class Random(nn.Module):
    """A chain of factors and non-factors drawn at random between two linear layers."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.gate = nn.Linear(32, 32)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for step in self.steps:
            if step == "relu":
                y = F.relu(y)
            elif step == "gate":
                y = y * torch.sigmoid(self.gate(x))
            elif step == "negate":
                y = -y
            elif step == "tanh":
                y = torch.tanh(y)
            elif step == "shift":
                y = y + 1
            elif step == "mix":
                y = y + y.roll(1, -1)
        return self.last(y) + x


FACTORS = {"relu", "gate", "negate"}


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.sampled_from(["relu", "gate", "negate", "tanh", "shift", "mix"]), max_size=4))
def test_in_random_graphs_what_is_folded_is_exact_and_factors_are_found(steps: list[str]) -> None:
    torch.manual_seed(0)
    block = Random(steps)
    folds, _ = folds_of(block, 32)
    fresh = torch.randn(3, 9, 32)
    with torch.no_grad():
        reference = block(fresh)
        # Two opposite ReLUs leave nothing to see.
        lit = bool((reference - fresh - block.last.bias).abs().max() > 1e-6)
        for fold in folds.values():
            apply(block, fold, torch.rand(len(fold.rows)) * 3 + 0.2)
        change = float((block(fresh) - reference).abs().max() / reference.abs().max())
    assert change < 10 * TOLERANCE
    if set(steps) <= FACTORS and lit:
        assert folds["last"].producer == "first"


FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    # name: changes to the tiny model, folds expected in a block
    "llama": ({"num_key_value_heads": 2}, 4),
    "mistral": ({"num_key_value_heads": 2, "head_dim": 16}, 4),
    "qwen2": ({"num_key_value_heads": 2}, 4),
    "qwen3": ({"num_key_value_heads": 2, "head_dim": 16}, 4),
    "gemma": ({"num_key_value_heads": 2, "head_dim": 16}, 4),
    "gemma2": ({"num_key_value_heads": 2, "head_dim": 16}, 4),
    "gemma3_text": ({"num_key_value_heads": 2, "head_dim": 16}, 4),
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64}, 4),
    "gpt_neox": ({}, 3),
    "falcon": ({"multi_query": True}, 2),
    "phi": ({"num_key_value_heads": 2}, 2),
    "phi3": ({"num_key_value_heads": 2}, 4),
    "bloom": ({"n_head": 4, "n_layer": 2}, 3),
    "cohere": ({"num_key_value_heads": 4}, 3),
    "starcoder2": ({"num_key_value_heads": 2}, 3),
    "olmo2": ({}, 2),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_of_decoders_are_discovered_without_being_listed(
    family: str, tiny: Any, tmp_path: Any
) -> None:
    from awq import QuantConfig
    from awq.pipeline import structure_of

    changes, expected = FAMILIES[family]
    tiny(family, **changes).save_pretrained(tmp_path)
    found = structure_of(tmp_path, QuantConfig(group_size=32))
    for kind in found["kinds"]:
        proved = [fold for fold in kind["folds"] if fold["proved"]]
        assert len(proved) == expected, kind["folds"]
        assert all(fold["change"] < TOLERANCE for fold in proved)
        assert not kind["skipped"]


@torch.no_grad()
def test_an_expert_without_tokens_reads_what_the_others_read(tiny: Any, tmp_path: Path) -> None:
    """Llama 4 gives every expert all tokens, and zeros for those of others: zeros are like any input."""
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 4}
    tiny("llama4_text", **sizes, interleave_moe_layer_step=1).save_pretrained(tmp_path)
    skeleton = open_model(tmp_path)
    name, (block, *_) = find_blocks(skeleton.model)
    alike = {"input_ids": torch.full((2, 12), 7)}  # one token goes one way
    (item,) = dry_pass(skeleton, name, [alike], torch.device("cpu"))
    skeleton.load(block, f"{name}.0", torch.device("cpu"))

    def run() -> torch.Tensor:
        return item.calls[0].run(block, item.hidden)

    inputs = propose(block, run, run).inputs
    ways_in = {f"feed_forward.experts.{n}.{part}_proj" for n in range(4) for part in ("gate", "up")}
    assert ways_in < set(inputs["feed_forward.router"])
    assert all(
        inputs[f"feed_forward.experts.{n}.down_proj"] == (f"feed_forward.experts.{n}.down_proj",)
        for n in range(4)
    )
    assert "feed_forward.shared_expert.up_proj" in inputs["feed_forward.router"]

"""Where the outputs of layers are added up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.model import find_blocks
from awq.model.sums import find_sums


class Block(nn.Module):
    """Two layers that each add to what is there, the first one in a given manner."""

    def __init__(self, factor: float = 1.0, normed: bool = False, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.post = nn.LayerNorm(16), nn.LayerNorm(16)
        self.factor, self.normed, self.twice = factor, normed, twice

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.first(hidden)
        if self.twice:
            out = self.first(out)
        hidden = hidden + (self.post(out) if self.normed else out) * self.factor
        return hidden + self.second(torch.relu(self.norm(hidden)))


def sums_of(block: nn.Module) -> dict[str, tuple[str | None, float]]:
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    found = find_sums(block, ["first", "second"], lambda: block(hidden))
    return {name: (place.reader, round(place.factor, 4)) for name, place in found.items()}


def test_a_sum_is_found_where_it_is_read_and_in_the_output() -> None:
    assert sums_of(Block()) == {"first": ("norm", 1.0), "second": (None, 1.0)}


def test_a_constant_factor_is_found() -> None:
    assert sums_of(Block(factor=0.25)) == {"first": ("norm", 0.25), "second": (None, 1.0)}


def test_behind_a_layer_with_a_norm_of_its_own_there_is_its_output_alone() -> None:
    assert sums_of(Block(normed=True)) == {"first": ("post", 1.0), "second": (None, 1.0)}


def test_a_layer_that_runs_twice_is_left_out() -> None:
    assert sums_of(Block(twice=True)) == {"second": (None, 1.0)}


def test_the_block_is_left_as_it_was() -> None:
    block, hidden = Block(), torch.ones(1, 3, 16)
    before = block(hidden)
    sums_of(block)
    assert torch.equal(block(hidden), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": None}),
        (
            "gemma2",
            {"head_dim": 16},
            {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "post_feedforward_layernorm"},
        ),
        ("gpt_neox", {}, {"attention.dense": None, "mlp.dense_4h_to_h": None}),
        (
            "granite",
            {"residual_multiplier": 0.5},
            {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": None},
        ),
    ],
)
def test_architectures(
    family: str, changes: dict[str, Any], expected: dict[str, str | None], tiny: Any
) -> None:
    """Gemma 2 has a norm behind each of the layers; parallel branches meet at the end."""
    model = tiny(family, **changes).eval()
    _, blocks = find_blocks(model)
    ids = torch.arange(24).view(2, 12)
    names = [name for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear)]
    kept: list[Tensor] = []

    def run() -> Tensor:
        handle = blocks[0].register_forward_hook(
            lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        model(ids)
        handle.remove()
        return kept.pop()

    found = find_sums(blocks[0], names, run)
    assert {name: place.reader for name, place in found.items()} == expected
    for place in found.values():
        assert place.factor == pytest.approx(changes.get("residual_multiplier", 1.0), rel=1e-3)

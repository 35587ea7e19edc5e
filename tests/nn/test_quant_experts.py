"""Quantized experts in place of modules that no library ships."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.errors import ConfigError, KernelError
from awq.model.experts import Part, parts_of
from awq.nn import QuantExperts, QuantLinear
from awq.weight import QuantizedWeight

EXPERTS, HIDDEN, INNER = 3, 32, 64


class Fused(nn.Module):
    """Experts with a clamped gate and biases of their own outside, as nobody else computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.limit = EXPERTS, 0.5
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * INNER, HIDDEN, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER, device="meta"))
        self.act = nn.Tanh()

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in index.unique():
            rows, slot = torch.where(index == expert)
            gate, up = F.linear(hidden[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = self.act(gate).clamp(max=self.limit) * up
            out.index_add_(0, rows, F.linear(inner, self.down_proj[expert]) * weights[rows, slot, None])
        return out


def layer(out_features: int, in_features: int, seed: int) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = QuantizedWeight(
        torch.randint(0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8),
        (torch.rand(out_features, in_features // 32, generator=generator) / 100).half(),
        torch.full((out_features, in_features // 32), 8, dtype=torch.uint8),
    )
    quantized = QuantLinear.from_weight(weight)
    quantized.prepare(torch.float32, "torch")
    return quantized


PARTS = {"gate_up_proj": Part(("g", "u")), "down_proj": Part(("d",))}


def experts(fused: nn.Module | None = None, parts: dict[str, Part] = PARTS) -> QuantExperts:
    every = [
        {"g": layer(INNER, HIDDEN, i), "u": layer(INNER, HIDDEN, i + 10), "d": layer(HIDDEN, INNER, i + 20)}
        for i in range(EXPERTS)
    ]
    return QuantExperts(fused or Fused(), parts, every)


def routed() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    index = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [0, 2]])  # expert 1 is never hit
    return torch.randn(5, HIDDEN, generator=generator), index, torch.rand(5, 2, generator=generator)


def test_the_original_forward_runs_on_quantized_experts() -> None:
    quantized = experts()
    out = quantized(*routed())
    reference = copy.deepcopy(quantized).dequantize()
    assert isinstance(reference, Fused)
    assert reference.gate_up_proj.shape == (EXPERTS, 2 * INNER, HIDDEN)
    torch.testing.assert_close(out, reference(*routed()), rtol=1e-5, atol=1e-6)
    assert quantized.num_experts == EXPERTS


def test_gradients_reach_the_inputs() -> None:
    quantized = experts()
    hidden, index, weights = routed()
    hidden.requires_grad_()
    quantized(hidden, index, weights).square().sum().backward()
    ours, hidden.grad = hidden.grad, None
    quantized.dequantize()(hidden, index, weights).square().sum().backward()
    torch.testing.assert_close(ours, hidden.grad, rtol=1e-4, atol=1e-6)


def test_only_experts_that_are_hit_are_computed() -> None:
    quantized = experts()
    calls: list[str] = []
    for name, module in quantized.named_modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    quantized(*routed())
    assert sorted(calls) == ["0.d", "0.g", "0.u", "2.d", "2.g", "2.u"]


def test_a_layer_put_in_anothers_place_is_used() -> None:
    """As PEFT does."""
    quantized = experts()
    before = quantized(*routed())
    first = quantized.get_submodule("0")
    first.d = nn.Linear(INNER, HIDDEN)
    assert not torch.allclose(before, quantized(*routed()))
    with pytest.raises(ConfigError, match="unload the adapters"):
        quantized.dequantize()


def test_a_copy_of_the_model_stands_alone() -> None:
    quantized = experts()
    other = copy.deepcopy(quantized)
    expected = quantized(*routed())
    quantized.get_submodule("0").d = nn.Linear(INNER, HIDDEN)
    torch.testing.assert_close(other(*routed()), expected)


class Biased(Fused):
    """Transposed weights whose output channels take turns, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed, self.is_concatenated = True, False
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, 2 * INNER, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, INNER, HIDDEN, device="meta"))
        self.down_bias = nn.Parameter(torch.ones(EXPERTS, HIDDEN))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in index.unique():
            rows, slot = torch.where(index == expert)
            both = hidden[rows] @ self.gate_up_proj[expert]
            inner = self.act(both[:, ::2]) * both[:, 1::2]
            value = torch.matmul(inner, self.down_proj[expert]) + self.down_bias[expert]
            out.index_add_(0, rows, value * weights[rows, slot, None])
        return out


def test_transposed_and_interleaved_weights_and_biases_are_used_as_the_module_means_them() -> None:
    fused = Biased()
    parts = {name: Part(PARTS[name].projections, True, True) for name in PARTS}
    assert {
        name: (p.transposed, p.interleaved) for name, p in (parts_of(fused) or {}).items()
    } == dict.fromkeys(PARTS, (True, True))
    quantized = experts(fused, parts)
    quantized.down_bias.data += 1  # as a loader would put another value in its place
    out = quantized(*routed())
    reference = copy.deepcopy(quantized).dequantize()
    assert torch.equal(reference.down_bias, torch.full((EXPERTS, HIDDEN), 2.0))
    torch.testing.assert_close(out, reference(*routed()), rtol=1e-5, atol=1e-6)


class AllAtOnce(Fused):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return torch.bmm(hidden.expand(EXPERTS, -1, -1), self.down_proj)


class Transposed(Fused):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return torch.matmul(hidden, self.gate_up_proj[0])


@pytest.mark.parametrize(("kind", "name"), [(AllAtOnce, "bmm"), (Transposed, "matmul")])
def test_a_forward_that_does_something_else_with_the_weights_fails_with_a_cure(
    kind: type[Fused], name: str
) -> None:
    with pytest.raises(
        KernelError, match=rf"{kind.__name__} uses its experts' weights in {name}.*dequantize"
    ):
        experts(kind())(*routed())

"""Root mean square norms that are found by proof and computed in C++."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from awq.hf.fused.norms import NativeNorm, Rule, rule_of, undo_native_norms, use_native_norms

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


pytestmark = pytest.mark.usefixtures("native_library")


def lively(module: Any, dtype: torch.dtype) -> Any:
    module = module.to(dtype)
    module.weight.data.copy_(torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0)))
    return module


def rows(dtype: torch.dtype, channels: int = 64, grad: bool = False) -> Tensor:
    return (
        torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_(grad)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "epsilon", "offset", "rounds"),
    [
        (LlamaRMSNorm(64, eps=1e-5), 1e-5, 0.0, True),
        (T5LayerNorm(64, eps=1e-6), 1e-6, 0.0, True),
        (Gemma2RMSNorm(64, eps=1e-3), 1e-3, 1.0, False),
        (nn.RMSNorm(64, eps=1e-4), 1e-4, 0.0, False),
    ],
)
def test_norms_are_found_and_computed_to_within_a_rounding(
    module: nn.Module, epsilon: float, offset: float, rounds: bool, dtype: torch.dtype
) -> None:
    module = lively(copy.deepcopy(module), dtype)
    x = rows(dtype)
    with torch.no_grad():
        expected = module(x)
        assert use_native_norms(module, dtype) == [""]
        got = module(x)
    rule = module.__dict__["forward"].rule
    assert rule[:2] == (epsilon, offset)
    assert rule.rounds is rounds or dtype == torch.float32
    assert got.dtype == dtype
    close = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    assert ((got - expected).abs() <= 1.01 * close * expected.abs()).all()
    assert dtype == torch.float32 or (got != expected).float().mean() < 0.02
    undo_native_norms(module)
    assert "forward" not in module.__dict__


class Squared(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) ** 2


class Forgetful(LlamaRMSNorm):
    """Adds twice its eps."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(mean + 2 * self.variance_epsilon)


class Failing(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        raise ValueError("not today")


class WithBuffer(LlamaRMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.register_buffer("steps", torch.zeros(1))


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(64, bias=False),
        nn.LayerNorm(64),
        nn.RMSNorm(64),  # whose eps depends on the dtype
        nn.RMSNorm((4, 16), eps=1e-5),
        nn.Linear(64, 64, bias=False),
        nn.PReLU(64),
        LlamaRMSNorm(40),
        Squared(64),
        Forgetful(64),
        Failing(64),
        WithBuffer(64),
        LlamaRMSNorm(64).to("meta"),
        LlamaRMSNorm(64).double(),
    ],
)
def test_what_is_no_such_norm_is_left_alone(module: nn.Module) -> None:
    assert rule_of(module, torch.float32) is None
    assert use_native_norms(module, torch.float32) == []


def test_a_norm_whose_result_has_another_dtype_is_left_alone() -> None:
    """transformers multiplies with a float32 weight in float32."""
    assert rule_of(LlamaRMSNorm(64), torch.bfloat16) is None
    assert rule_of(Gemma2RMSNorm(64), torch.bfloat16) == Rule(1e-6, 1.0, False, torch.bfloat16)


def test_gradients_other_dtypes_and_compilation_are_the_modules_own() -> None:
    module, plain = (lively(LlamaRMSNorm(64), torch.float32) for _ in range(2))
    use_native_norms(module, torch.float32)
    for each in (module, plain):
        each(rows(torch.float32, grad=True)).sum().backward()
    assert torch.equal(module.weight.grad, plain.weight.grad)
    with torch.no_grad():
        half = rows(torch.float16)
        assert torch.equal(module(half), plain(half))
        module, plain = module.to(torch.bfloat16), plain.to(torch.bfloat16)
        assert torch.equal(module(rows(torch.bfloat16)), plain(rows(torch.bfloat16)))
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(rows(torch.bfloat16)), plain(rows(torch.bfloat16)))


def test_copies_and_pickles_read_their_own_weights() -> None:
    module = nn.Sequential(lively(LlamaRMSNorm(64), torch.float32))
    use_native_norms(module, torch.float32)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(twin[0].__dict__["forward"], NativeNorm)
        assert twin[0].__dict__["forward"].module is twin[0]
        twin[0].weight.data.zero_()
        with torch.no_grad():
            assert (twin(rows(torch.float32)) == 0).all()
            assert (module(rows(torch.float32)) != 0).any()


def test_a_changed_weight_counts_at_once() -> None:
    module = lively(LlamaRMSNorm(64), torch.float32)
    use_native_norms(module, torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        before = module(rows(torch.float32))
        module.weight.mul_(2)
        assert torch.equal(module(rows(torch.float32)), 2 * before)
        module.weight = nn.Parameter(torch.zeros(64))
        assert (module(rows(torch.float32)) == 0).all()

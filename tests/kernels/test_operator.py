"""The operator around the kernels: gradients, shapes without values, autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq.kernels import LayerSpec, choose, kernel_names, multiply
from awq.kernels.registry import kernel_named
from awq.nn import QuantLinear
from awq.weight import QuantizedWeight
from random_weights import random_weight

ROWS, COLUMNS, GROUP = 48, 64, 32
KERNELS = [
    name
    for name in kernel_names()
    if kernel_named(name).refuses(LayerSpec("cpu", torch.float32, COLUMNS, ROWS, GROUP)) is None
]


@pytest.fixture
def weight() -> QuantizedWeight:
    return random_weight(ROWS, COLUMNS, GROUP)


def prepared(name: str, weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> tuple:
    spec = LayerSpec("cpu", dtype, COLUMNS, ROWS, GROUP)
    if reason := kernel_named(name).refuses(spec):
        pytest.skip(reason)
    kernel = choose(spec, name).kernel
    return kernel, kernel.prepare(weight, dtype)


def activations(rows: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_are_those_of_the_dequantized_weight(
    name: str, dtype: torch.dtype, weight: QuantizedWeight
) -> None:
    kernel, state = prepared(name, weight, dtype)
    inputs = activations(dtype=dtype).requires_grad_()
    out = multiply(inputs, kernel, state, ROWS)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    out.backward(towards)
    assert inputs.grad is not None
    expected = towards.float() @ weight.dequantize()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert float((inputs.grad.float() - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("name", KERNELS)
def test_the_operator_is_what_it_tells_pytorch(name: str, weight: QuantizedWeight) -> None:
    """Schema, shapes without values, autograd, and tracing with dynamic shapes."""
    _, state = prepared(name, weight)
    tensors = [part for part in state if isinstance(part, Tensor)]
    numbers = [part for part in state if not isinstance(part, Tensor)]
    arguments = (activations().requires_grad_(), tensors, numbers, name, ROWS)
    torch.library.opcheck(torch.ops.openawq.multiply.default, arguments)
    backward = (torch.randn(5, ROWS), tensors, numbers, name, COLUMNS)
    torch.library.opcheck(torch.ops.openawq.multiply_transposed.default, backward)


@pytest.mark.parametrize("name", KERNELS)
def test_values_do_not_depend_on_whether_gradients_are_wanted(name: str, weight: QuantizedWeight) -> None:
    kernel, state = prepared(name, weight)
    plain = multiply(activations(), kernel, state, ROWS)
    assert not plain.requires_grad
    wanted = multiply(activations().requires_grad_(), kernel, state, ROWS)
    assert wanted.requires_grad
    assert torch.equal(plain, wanted)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_decides_the_dtype_as_it_does_for_linear_layers(
    name: str, grad: bool, weight: QuantizedWeight
) -> None:
    kernel, state = prepared(name, weight)
    inputs = activations().requires_grad_(grad)
    with torch.autocast("cpu", torch.bfloat16):
        out = multiply(inputs, kernel, state, ROWS)
        assert out.dtype == torch.nn.Linear(COLUMNS, ROWS)(inputs).dtype == torch.bfloat16
    if grad:
        out.float().sum().backward()
        assert inputs.grad is not None
        assert inputs.grad.dtype == torch.float32


def test_a_layer_first_used_in_inference_mode_can_be_trained_through(weight: QuantizedWeight) -> None:
    layer = QuantLinear.from_weight(weight)
    with torch.inference_mode():
        layer(activations())
    inputs = activations().requires_grad_()
    layer(inputs).sum().backward()
    assert inputs.grad is not None

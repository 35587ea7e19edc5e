"""`QuantLinear` as a module: filled, moved, saved, copied, called on anything, and never losing a code."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.errors import KernelError
from awq.formats import gemm
from awq.nn import QuantLinear
from awq.weight import QuantizedWeight
from random_weights import random_weight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def weight() -> QuantizedWeight:
    return random_weight()


@pytest.fixture
def layer(weight: QuantizedWeight) -> QuantLinear:
    return QuantLinear.from_weight(weight, torch.linspace(-1, 1, 48).half())


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(layer: QuantLinear, weight: QuantizedWeight, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x.float(), weight.dequantize(), bias)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Names, dtypes, shapes and bytes."""
    return set(one) == set(two) and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def test_it_computes_the_product_and_adds_the_bias(layer: QuantLinear, weight: QuantizedWeight) -> None:
    x = inputs(5, 64)
    torch.testing.assert_close(layer(x), expected(layer, weight, x), rtol=0.02, atol=0.02)
    layer.prepare(torch.float32, "torch")
    torch.testing.assert_close(layer(x), expected(layer, weight, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64)])
def test_any_number_of_dimensions_and_any_float_dtype_go_through(
    shape: tuple[int, ...], dtype: torch.dtype, layer: QuantLinear, weight: QuantizedWeight
) -> None:
    x = inputs(*shape, dtype=dtype)
    got = layer(x)
    assert got.dtype == dtype
    assert got.shape == (*shape[:-1], 48)
    torch.testing.assert_close(got.float(), expected(layer, weight, x), rtol=0.03, atol=0.03)


def test_inputs_need_not_be_contiguous(layer: QuantLinear) -> None:
    x = inputs(64, 5).t()
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_inputs_of_another_width_are_refused(layer: QuantLinear) -> None:
    with pytest.raises(KernelError, match="inputs of 32 channels were given to a quantized layer of 64"):
        layer(inputs(4, 32))


def test_a_layer_without_a_bias_has_none(weight: QuantizedWeight) -> None:
    layer = QuantLinear.from_weight(weight)
    assert set(layer.state_dict()) == {"qweight", "qzeros", "scales"}
    x = inputs(2, 64)
    torch.testing.assert_close(layer(x), expected(layer, weight, x), rtol=0.02, atol=0.02)


def test_codes_are_arranged_at_the_first_product_and_held_once(layer: QuantLinear) -> None:
    assert "not prepared" in layer.extra_repr()
    layer(inputs(1, 64))
    assert "kernel=cpu-" in layer.extra_repr()
    assert not hasattr(layer, "qweight")
    held = sum(buffer.numel() for buffer in layer.buffers())
    assert held == 48  # the bias


def test_its_line_in_a_printed_model_tells_its_measures(layer: QuantLinear) -> None:
    line = repr(nn.Sequential(layer))
    for part in ("in_features=64", "out_features=48", "bias=True", "bits=4", "group_size=32"):
        assert part in line


def test_preparing_gives_the_kernel_and_the_reason(layer: QuantLinear) -> None:
    choice = layer.prepare(torch.float16)
    assert choice.kernel.name.startswith("cpu-")
    assert "float16 on cpu" in choice.reason
    assert layer.prepare(torch.float16, "torch").kernel.name == "torch"
    layer.to(torch.float32)
    layer(inputs(1, 64))
    assert "kernel=torch" in layer.extra_repr()  # a preference lasts


def test_a_kernel_that_cannot_serve_leaves_the_layer_usable() -> None:
    weight = random_weight(rows=24, columns=48, group=16)
    layer = QuantLinear.from_weight(weight)
    with pytest.raises(KernelError, match="cannot serve"):
        layer.prepare(torch.float32, "cpu-int4")
    assert torch.equal(layer.weight_canonical().codes, weight.codes)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("rows", [8, 16, 48, 64, 96])
def test_a_state_dict_goes_round_byte_by_byte(rows: int, prepared: bool) -> None:
    weight = random_weight(rows)
    before = gemm.pack(weight)
    layer = QuantLinear.from_weight(weight)
    if prepared:
        layer.prepare(torch.float32)
    state = layer.state_dict()
    assert same({name: state[name] for name in before}, before)
    other = QuantLinear(64, rows, 32)
    if prepared:
        other.load_state_dict(QuantLinear.from_weight(random_weight(rows, seed=9)).state_dict())
        other(inputs(1, 64))  # what it held before must not survive
    other.load_state_dict(state)
    assert same(other.state_dict(), state)
    x = inputs(2, 64)
    assert torch.equal(other(x), layer(x))


def test_tensors_that_do_not_fit_are_not_loaded(layer: QuantLinear) -> None:
    state = layer.state_dict()
    for broken in (
        {name: state[name] for name in state if name != "scales"},
        state | {"more": torch.ones(1)},
        state | {"qweight": state["qweight"][:-1]},
    ):
        with pytest.raises(RuntimeError, match=r"scales|more|qweight"):
            QuantLinear(64, 48, 32, bias=True).load_state_dict(broken)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cast_is_for_activations_and_changes_no_weight(
    dtype: torch.dtype, layer: QuantLinear, weight: QuantizedWeight
) -> None:
    layer(inputs(1, 64))
    layer.to(dtype)
    after = layer.weight_canonical()
    assert torch.equal(after.codes, weight.codes)
    assert torch.equal(after.zeros, weight.zeros)
    assert after.scales.dtype == torch.float16
    assert torch.equal(after.scales, weight.scales)
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    assert layer(inputs(2, 64, dtype=dtype)).dtype == dtype


def test_moving_gives_the_kernels_arrangement_up_and_keeps_the_weight(
    layer: QuantLinear, weight: QuantizedWeight
) -> None:
    layer(inputs(1, 64))
    moved = nn.Sequential(layer).to("cpu")[0]
    assert torch.equal(moved.weight_canonical().codes, weight.codes)
    layer.to("meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


@pytest.mark.parametrize("prepared", [False, True])
def test_copies_are_independent(prepared: bool, layer: QuantLinear) -> None:
    if prepared:
        layer(inputs(1, 64))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    twin = copy.deepcopy(layer)
    assert same(twin.state_dict(), before)
    x = inputs(3, 64)
    assert torch.equal(twin(x), layer(x))
    twin.load_state_dict(QuantLinear.from_weight(random_weight(seed=5), torch.ones(48).half()).state_dict())
    assert same(layer.state_dict(), before)


@pytest.mark.parametrize("prepared", [False, True])
def test_pickles_hold_the_checkpoints_tensors_and_no_kernels_arrangement(
    prepared: bool, layer: QuantLinear
) -> None:
    """An arrangement depends on the processor: on another one its bytes would mean other codes."""
    if prepared:
        layer.prepare(torch.float32, "torch")
    file = io.BytesIO()
    torch.save(layer, file)
    for dumped in (pickle.dumps(layer), file.getvalue()):
        assert b"awq.kernels" not in dumped
    file.seek(0)
    for back in (pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert same(back.state_dict(), layer.state_dict())
        assert torch.equal(back(inputs(3, 64)), layer(inputs(3, 64)))


def test_a_layer_on_the_meta_device_is_filled_by_its_loader(weight: QuantizedWeight) -> None:
    layer = QuantLinear(64, 48, 32, device="meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layer.load_state_dict(gemm.pack(weight), assign=True)
    x = inputs(2, 64)
    torch.testing.assert_close(layer(x), expected(layer, weight, x), rtol=0.02, atol=0.02)


def test_a_layer_made_with_storage_dtypes_has_them() -> None:
    layer = QuantLinear(64, 48, 32, bias=True, dtype=torch.float32, scales_dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert dtypes == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.bfloat16,
        "bias": torch.float32,
    }


def test_gradients_reach_the_inputs(layer: QuantLinear, weight: QuantizedWeight) -> None:
    layer.prepare(torch.float32, "torch")
    x = inputs(3, 64).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 64), rtol=1e-4, atol=1e-5)


def test_products_in_inference_mode_and_out_of_it_mix(layer: QuantLinear) -> None:
    x = inputs(2, 64)
    with torch.inference_mode():
        first: Any = layer(x)
    assert torch.equal(layer(x), first)
    assert len(layer.state_dict()) == 4

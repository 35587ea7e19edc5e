"""Humming as an optional kernel: what it refuses, what it is given, and when it is chosen.

Its programs run on GPUs alone. Here its package is stood in for by one in plain PyTorch, with an arrangement
of its own, so that what we do around it is tested everywhere; the real one is tested where it is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.errors import KernelError
from awq.formats import gemm
from awq.formats.layout import pack_nibbles, unpack_nibbles
from awq.kernels import LayerSpec, choose, kernel_choices, multiply
from awq.kernels import humming as ours
from awq.kernels.humming import Humming, plain_tensors
from awq.weight import QuantizedWeight
from random_weights import random_weight

SPEC = {
    "device": "cuda",
    "dtype": torch.bfloat16,
    "in_features": 4096,
    "out_features": 4096,
    "group_size": 128,
}


@pytest.fixture
def nothing_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "missing", lambda: None)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as `missing` looks: an Ampere card under CUDA 13."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8 + index, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ours.metadata, "version", lambda name: "0.1.19")
    ours.missing.cache_clear()
    yield
    ours.missing.cache_clear()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "runs on NVIDIA GPUs, not on cpu"),
        ({"bits": 8}, "8 bits do not fit a nibble"),
        ({"dtype": torch.float32}, "multiplies float16 and bfloat16, not float32"),
        ({"group_size": 256}, "takes groups of (32, 64, 128) or the whole row, not 256"),
        ({"out_features": 192}, "192 output channels do not divide by 128"),
        ({"in_features": 4064, "group_size": 32}, "4064 input channels do not divide by 64"),
    ],
)
def test_a_layer_that_it_does_not_serve_is_refused_with_the_reason(
    change: dict[str, Any], reason: str, nothing_missing: None
) -> None:
    spec = LayerSpec(**(SPEC | change))
    assert reason in (Humming().refuses(spec) or "")
    with pytest.raises(KernelError, match="kernel 'humming' cannot serve this layer"):
        choose(spec, "humming")


@pytest.mark.parametrize("group", [32, 64, 128, 4096])
def test_every_group_that_awq_models_have_is_served(group: int, nothing_missing: None) -> None:
    assert Humming().refuses(LayerSpec(**(SPEC | {"group_size": group}))) is None


def test_without_a_gpu_that_is_what_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert Humming().refuses(LayerSpec(**SPEC)) == "PyTorch finds no NVIDIA GPU here"


def test_a_missing_package_is_told_with_the_command_for_this_cuda(
    a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ours.missing() == "humming-kernels is not installed (pip install 'humming-kernels[cu13]')"


def test_another_package_of_the_name_is_not_taken_for_it(
    a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise ours.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ours.metadata, "version", version)
    assert "is not humming-kernels" in (ours.missing() or "")


def test_an_old_version_is_told(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours.metadata, "version", lambda name: "0.1.9")
    assert "humming-kernels 0.1.9 is older than 0.1.19" in (ours.missing() or "")


def test_the_oldest_of_several_gpus_decides(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index else (7, 5))
    assert ours.missing() == "it needs compute capability 8.0 or newer, not 7.5"


def test_a_package_that_does_not_start_is_told_with_its_own_words(
    a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(name: str) -> ModuleType:
        raise RuntimeError("No suitable CUDA 13 environment found.")

    monkeypatch.setattr(ours.importlib, "import_module", import_module)
    assert "does not start: No suitable CUDA 13 environment found." in (ours.missing() or "")


def test_it_is_never_chosen_unasked(nothing_missing: None) -> None:
    assert choose(LayerSpec(**SPEC)).kernel.name != "humming"


def test_marlin_means_humming_where_it_serves_and_the_fastest_elsewhere(nothing_missing: None) -> None:
    assert "marlin" in kernel_choices()
    taken = choose(LayerSpec(**SPEC), "marlin")
    assert taken.kernel.name == "humming"
    assert taken.reason == "humming: what there is of kind marlin"
    odd = choose(LayerSpec(**(SPEC | {"out_features": 200})), "marlin")
    assert odd.kernel.name in ("triton", "torch")
    assert "not humming: 200 output channels do not divide by 128" in odd.reason
    assert choose(LayerSpec(**(SPEC | {"device": "cpu"})), "marlin").kernel.name.startswith("cpu-")


def test_its_plain_tensors_hold_each_code_and_zero_point_where_it_reads_them() -> None:
    weight = random_weight(16, 64, 32)
    tensors = plain_tensors(weight, torch.float16)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert shapes == {
        "weight": ((16, 8), torch.int32),
        "weight_scale": ((16, 2), torch.float16),
        "zero_point": ((2, 2), torch.int32),
    }
    for row in range(16):
        for column in range(64):
            word = int(tensors["weight"][row, column // 8])
            assert (word >> 4 * (column % 8)) & 15 == int(weight.codes[row, column])
        for group in range(2):
            word = int(tensors["zero_point"][row // 8, group])
            assert (word >> 4 * (row % 8)) & 15 == int(weight.zeros[row, group])
    assert torch.equal(tensors["weight_scale"], weight.scales)


def test_scales_that_its_arithmetic_cannot_hold_are_refused() -> None:
    weight = random_weight(16, 64, 32)
    tiny = QuantizedWeight(weight.codes, torch.full((16, 2), 1e-7), weight.zeros)
    with pytest.raises(
        KernelError, match=r"too small or too large for float16, .* load the model in bfloat16"
    ):
        plain_tensors(tiny, torch.float16)
    plain_tensors(tiny, torch.bfloat16)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A package `humming` in plain PyTorch, whose arrangement reverses rows; tells what rows it was asked."""
    asked: list[int] = []

    def transform(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "weight": tensors["weight"].flip(0),
            "weight_scale": tensors["weight_scale"].flip(0).t().contiguous(),
            "zero_point": tensors["zero_point"].flip(0).t().contiguous(),
        }

    def launch(*, configs: Tensor, inputs: Tensor, **state: Tensor) -> Tensor:
        codes = unpack_nibbles(state["weight"]).flip(0)
        zeros = unpack_nibbles(state["zero_point"].t().flip(0).t().contiguous()).t()
        scales = state["weight_scale"].t().flip(0)
        weight = QuantizedWeight(codes, scales.contiguous(), zeros.contiguous())
        return inputs @ weight.dequantize(inputs.dtype).t()

    def heuristics(config: Any, shape_m: int, device: int) -> dict[str, int]:
        asked.append(shape_m)
        return {"rows": shape_m}

    modules: dict[str, dict[str, Any]] = {
        "humming": {"dtypes": SimpleNamespace(DataType=SimpleNamespace(from_torch_dtype=str), uint4="uint4")},
        "humming.transform": {
            "transform_humming_tensors": transform,
            "prepare_layer_config": lambda *a, **k: SimpleNamespace(to_str=lambda: "{}"),
        },
        "humming.schema": {"HummingInputSchema": SimpleNamespace, "HummingWeightSchema": SimpleNamespace},
        "humming.tune": {"get_heuristics_config": heuristics},
        "humming.kernel": {},
        "humming.kernel.humming": {
            "HummingKernel": SimpleNamespace(prepare_kernels=lambda *a: torch.zeros(4, dtype=torch.int64))
        },
        "humming.ops": {},
        "humming.ops.launcher": {"launch_kernel": launch},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(ours, "_index", lambda device: 0)
    for cached in (ours._program, ours._layer_config):
        cached.cache_clear()
    yield asked
    for cached in (ours._program, ours._layer_config):
        cached.cache_clear()


@pytest.mark.parametrize(("columns", "group"), [(64, 32), (1600, 64), (2048, 2048)])
def test_the_very_codes_come_back_whatever_the_arrangement(
    columns: int, group: int, stand_in: list[int]
) -> None:
    kernel, weight = Humming(), random_weight(128, columns, group)
    state = kernel.prepare(weight, torch.float32)
    assert torch.equal(kernel.codes(state), weight.codes)
    assert torch.equal(state.scales, weight.scales)
    assert torch.equal(state.zeros, weight.zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_right_in_the_dtype_it_was_arranged_for_and_in_another(
    dtype: torch.dtype, stand_in: list[int]
) -> None:
    kernel, weight = Humming(), random_weight(128, 64, 32)
    state = kernel.prepare(weight, torch.float32)
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = multiply(inputs, kernel, state, 128)
    assert got.dtype == dtype
    expected = inputs.double() @ weight.dequantize().double().t()
    assert float((got.double() - expected).norm() / expected.norm()) < (1e-2 if dtype.itemsize == 2 else 1e-6)
    assert kernel.forward(inputs[:0], state).shape == (0, 128)


def test_one_program_serves_the_rows_up_to_a_power_of_two(stand_in: list[int]) -> None:
    kernel = Humming()
    state = kernel.prepare(random_weight(128, 64, 32), torch.float32)
    for rows in (1, 2, 3, 4, 5, 8, 33, 64, 9000, 20000):
        kernel.forward(torch.zeros(rows, 64), state)
    assert stand_in == [1, 2, 4, 8, 64, 8192]


def test_gradients_flow_through_it_to_the_inputs(stand_in: list[int]) -> None:
    kernel, weight = Humming(), random_weight(128, 64, 32)
    state = kernel.prepare(weight, torch.float32)
    inputs = torch.randn(3, 64, requires_grad=True)
    multiply(inputs, kernel, state, 128).sum().backward()
    assert torch.allclose(inputs.grad, weight.dequantize().sum(0).expand(3, 64), rtol=1e-4)


def test_its_own_reader_of_awq_checkpoints_makes_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("humming", reason="humming-kernels is not installed")
    from humming import ops
    from humming.schema.awq import AWQWeightSchema

    # These two are CUDA programs there, of a plain meaning.
    monkeypatch.setattr(ops, "unpack_weight", lambda words, bits: unpack_nibbles(words).int())
    monkeypatch.setattr(ops, "pack_weight", lambda codes, bits: pack_nibbles(codes.to(torch.uint8)))
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    weight = random_weight(128, 320, 64)
    schema, theirs = AWQWeightSchema(bits=4, group_size=64)._convert_humming(
        gemm.pack(weight), [128], [320], torch.float16
    )
    tensors = plain_tensors(weight, torch.float16)
    assert set(tensors) == set(theirs)
    assert all(torch.equal(tensors[name], theirs[name]) for name in theirs)
    assert torch.equal(schema.dequant_tensors(tensors), weight.dequantize())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_real_one_agrees_with_the_oracle_and_gives_the_codes_back(dtype: torch.dtype) -> None:
    kernel = Humming()
    reason = kernel.refuses(LayerSpec("cuda", dtype, 320, 384, 64))
    if reason:
        pytest.skip(reason)
    weight = random_weight(384, 320, 64).to("cuda")
    state = kernel.prepare(weight, dtype)
    assert torch.equal(kernel.codes(state), weight.codes)
    for rows in (1, 17, 64):
        inputs = torch.randn(rows, 320, device="cuda").to(dtype)
        expected = inputs.double() @ weight.dequantize().double().t()
        error = float((kernel.forward(inputs, state).double() - expected).norm() / expected.norm())
        assert error < (6e-4 if dtype == torch.float16 else 4e-3)

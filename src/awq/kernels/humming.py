"""Products on NVIDIA GPUs by `humming-kernels`, where that package is installed and asked for.

Humming is a family of CUDA templates for weights of few bits, in the line of Marlin. Its wheel has no
finished kernels: for each shape of a layer, and for each size of batch when it first comes, one is compiled
(by NVRTC, some seconds) and kept in `~/.humming`. Its arrangement of the codes is made by its own programs
from plain rows of nibbles. The codes come back as the product with the identity, whatever the arrangement.

Weights are rounded to the dtype of the activations, and their scales before that: in bfloat16 a product's
error is about twice that of the other kernels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from awq.errors import KernelError
from awq.formats.layout import pack_nibbles
from awq.kernels.spec import LayerSpec
from awq.weight import QuantizedWeight

_DTYPES = (torch.float16, torch.bfloat16)
_GROUPS = (32, 64, 128)
_TILE = (128, 64)  # output and input channels
_OLDEST = "0.1.19"
_OLDEST_CAPABILITY = (8, 0)
# What programs that share a sum count themselves in; the size that Humming's own layer gives it.
_LOCKS = 2048
# Rows of the identity that are multiplied at once to get the codes back.
_SLAB = 1024
_MOST_ROWS = 8192
# A scale that rounds by more than this was too small for the dtype, not just finer than it.
_CLOSE = 2**-8


class State(NamedTuple):
    """Humming's tensors, and the scales and zero points as they were given.

    weight: int32 `[in / 16, out * 2]`; weight_scale `[groups, out]` in the dtype of the activations;
    zero_point: int32 `[groups, out / 8]`; all three permuted as Humming reads them.
    locks: int32, zeros between products, so that one layer must not be run on two streams at once.
    scales: `[out, groups]`; zeros: uint8 `[out, groups]`.
    """

    weight: Tensor
    weight_scale: Tensor
    zero_point: Tensor
    locks: Tensor
    scales: Tensor
    zeros: Tensor
    in_features: int


class Humming:
    """Humming's product for any number of rows."""

    name = "humming"
    any_shape = False
    state_type = State

    def refuses(self, spec: LayerSpec) -> str | None:
        """Why a layer cannot be served."""
        if spec.device != "cuda":
            return f"it runs on NVIDIA GPUs, not on {spec.device}"
        if spec.bits > 4:
            return f"{spec.bits} bits do not fit a nibble"
        if spec.dtype not in _DTYPES:
            dtype = str(spec.dtype).removeprefix("torch.")
            return f"it multiplies float16 and bfloat16, not {dtype}"
        if spec.group_size not in _GROUPS and spec.group_size != spec.in_features:
            return f"it takes groups of {_GROUPS} or the whole row, not {spec.group_size}"
        if spec.out_features % _TILE[0]:
            return f"{spec.out_features} output channels do not divide by {_TILE[0]}"
        if spec.in_features % _TILE[1]:
            return f"{spec.in_features} input channels do not divide by {_TILE[1]}"
        return missing()

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> State:
        """Arrange a weight for activations of `dtype`, float16 or bfloat16.

        Raises:
            KernelError: the scales are too small or too large for `dtype`.
        """
        from humming.transform import transform_humming_tensors

        device = weight.codes.device
        with torch.cuda.device(device):
            config = _layer_config(
                weight.out_features, weight.in_features, weight.group_size, dtype, _index(device)
            )
            tensors = transform_humming_tensors(config, plain_tensors(weight, dtype))
        locks = torch.zeros(_LOCKS, dtype=torch.int32, device=device)
        parts = (tensors["weight"], tensors["weight_scale"], tensors["zero_point"], locks)
        for part in parts:
            # A compiled model in CUDA graphs would copy these before every replay if it took them for inputs.
            torch._dynamo.mark_static_address(part)
        return State(*parts, weight.scales, weight.zeros, weight.in_features)

    def forward(self, inputs: Tensor, state: State) -> Tensor:
        """inputs `[rows, in_features]` times the weight."""
        rows, out_features = inputs.shape[0], state.scales.shape[0]
        if rows == 0:
            return inputs.new_empty(0, out_features)
        if inputs.dtype != state.weight_scale.dtype:  # it was arranged for another
            weight = QuantizedWeight(self.codes(state), state.scales, state.zeros)
            return F.linear(inputs, weight.dequantize(inputs.dtype))
        return _product(inputs, state)

    def codes(self, state: State) -> Tensor:
        """The codes: the product of the identity with scales of one and zero points of zero is exact."""
        bare = state._replace(
            weight_scale=torch.ones_like(state.weight_scale), zero_point=torch.zeros_like(state.zero_point)
        )
        codes = torch.empty(
            state.scales.shape[0], state.in_features, dtype=torch.uint8, device=state.weight.device
        )
        for start in range(0, state.in_features, _SLAB):
            rows = torch.zeros(
                min(_SLAB, state.in_features - start),
                state.in_features,
                dtype=state.weight_scale.dtype,
                device=state.weight.device,
            )
            rows.diagonal(start).fill_(1)
            codes[:, start : start + len(rows)] = _product(rows, bare).t().to(torch.uint8)
        return codes


def plain_tensors(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """A weight as Humming's programs read it, before their arrangement.

    `weight` int32 `[out, in / 8]` and `zero_point` int32 `[out / 8, groups]` hold eight nibbles a word, the
    first in the low bits, along the inputs and along the outputs; `weight_scale` is `[out, groups]`.

    Raises:
        KernelError: the scales are too small or too large for `dtype`.
    """
    scales = weight.scales.to(dtype)
    exact = weight.scales.float()
    if bool(((scales.float() - exact).abs() > exact.abs() * _CLOSE).any()):
        name = str(dtype).removeprefix("torch.")
        raise KernelError(
            f"scales of this layer are too small or too large for {name}, in which Humming multiplies them: "
            "load the model in bfloat16, or with another kernel"
        )
    return {
        "weight": pack_nibbles(weight.codes),
        "weight_scale": scales.contiguous(),
        "zero_point": pack_nibbles(weight.zeros.t()).t().contiguous(),
    }


def _product(inputs: Tensor, state: State) -> Tensor:
    from humming.ops.launcher import launch_kernel

    out_features, groups = state.scales.shape
    chosen = program_for(
        inputs.shape[0],
        out_features,
        state.in_features,
        state.in_features // groups,
        inputs.dtype,
        _index(inputs.device),
    )
    out: Tensor = launch_kernel(
        configs=chosen,
        inputs=inputs.contiguous(),
        weight=state.weight,
        weight_scale=state.weight_scale,
        zero_point=state.zero_point,
        locks=state.locks,
    )
    return out


def program_for(
    rows: int, out_features: int, in_features: int, group_size: int, dtype: torch.dtype, device: int
) -> Tensor:
    """The program for a number of rows, compiled when it first comes: what Humming's launcher takes.

    It is chosen for the next power of two. Left to itself, Humming compiles programs for about ninety ranges
    of rows at once.
    """
    bucket = min(_MOST_ROWS, 1 << (rows - 1).bit_length())
    return _program(bucket, out_features, in_features, group_size, dtype, device)


@functools.cache
def _program(
    rows: int, out_features: int, in_features: int, group_size: int, dtype: torch.dtype, device: int
) -> Tensor:
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    config = _layer_config(out_features, in_features, group_size, dtype, device)
    with torch.cuda.device(device):
        tuning = get_heuristics_config(config, shape_m=rows, device=device)
        found: Tensor = HummingKernel.prepare_kernels(config.to_str(), None, json.dumps(tuning), device)
    return found


@functools.cache
def _layer_config(
    out_features: int, in_features: int, group_size: int, dtype: torch.dtype, device: int
) -> Any:
    """Humming's description of a layer."""
    from humming import dtypes
    from humming.schema import HummingInputSchema, HummingWeightSchema
    from humming.transform import prepare_layer_config

    activations = dtypes.DataType.from_torch_dtype(dtype)
    schema = HummingWeightSchema(
        b_dtype=dtypes.uint4,
        bs_dtype=activations,
        weight_scale_group_size=0 if group_size == in_features else group_size,
        has_zero_point=True,
    )
    return prepare_layer_config(
        out_features,
        in_features,
        schema,
        HummingInputSchema(a_dtype=activations),
        torch_dtype=dtype,
        device=device,
    )


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def missing() -> str | None:
    """What this machine lacks for Humming, as a sentence; None when nothing."""
    cuda = torch.version.cuda
    if cuda is None or not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU here"
    cure = f"pip install 'humming-kernels[cu{cuda.partition('.')[0]}]'"
    if importlib.util.find_spec("humming") is None:
        return f"humming-kernels is not installed ({cure})"
    try:
        version = metadata.version("humming-kernels")
    except metadata.PackageNotFoundError:
        return f"the package humming that is installed is not humming-kernels ({cure})"
    if Version(version) < Version(_OLDEST):
        return f"humming-kernels {version} is older than {_OLDEST} (pip install -U humming-kernels)"
    capability = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if capability < _OLDEST_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    try:
        importlib.import_module("humming.transform")
        importlib.import_module("humming.jit.runtime").KernelRuntime._get_compiler().signature()
    except (ImportError, RuntimeError, OSError) as error:
        return f"humming-kernels is installed and does not start: {error} ({cure})"
    return None

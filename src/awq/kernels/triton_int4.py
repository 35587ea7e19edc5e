"""Products on GPUs through Triton, for CUDA and ROCm.

Up to a few hundred rows the codes are unpacked in registers on their way to the matrix units; from there on
the weight is written out as floats for a dense product, as that is then faster. The programs are in
`triton_programs`, and how they are launched in `triton_table`. All of them are deterministic.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.kernels.spec import LayerSpec
from awq.kernels.triton_launch import multiply
from awq.kernels.triton_table import DENSE_ROWS, Device, Launch, launch_for, most_tiles, plane_of
from awq.weight import QuantizedWeight

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Types multiplied without a float copy of the weight.
_DIRECT = (torch.float16, torch.bfloat16)
_OLDEST_TRITON = (3, 6)
_OLDEST_CAPABILITY = 80


class State(NamedTuple):
    """Codes and groups as `triton_programs` reads them.

    words: int16 `[out, chunks * plane]`, four codes each.
    pairs: int32 `[groups, out]`, a float32 scale whose lowest four bits are the zero point.
    low: uint8 `[groups, out]`, those four bits of the scales where they are float32; else empty.
    counters: int32, zeros between products; programs that share a sum count themselves here, so that one
        layer must not be run on two streams at once.
    """

    words: Tensor
    pairs: Tensor
    low: Tensor
    counters: Tensor
    group_size: int
    in_features: int
    dtype_of_scales: int

    @property
    def scales(self) -> Tensor:
        """Scales `[out, groups]`, exactly as they were given."""
        bits = self.pairs & -16
        if self.low.numel():
            bits = bits | self.low
        return bits.view(torch.float32).to(_DTYPES[self.dtype_of_scales]).t().contiguous()

    @property
    def zeros(self) -> Tensor:
        """Zero points uint8 `[out, groups]`."""
        return (self.pairs & 15).to(torch.uint8).t().contiguous()


class TritonInt4:
    """Unpack in registers for few rows, dequantize for many."""

    name = "triton"
    any_shape = False
    state_type = State

    def refuses(self, spec: LayerSpec) -> str | None:
        """Why a layer cannot be served."""
        if spec.device != "cuda":
            return f"it runs on CUDA and ROCm devices, not on {spec.device}"
        if spec.bits > 4:
            return f"{spec.bits} bits do not fit a nibble"
        if spec.group_size % 32:
            return f"it takes groups of a multiple of 32, not {spec.group_size}"
        if spec.dtype not in _DTYPES:
            dtype = str(spec.dtype).removeprefix("torch.")
            return f"it multiplies float16, bfloat16 and float32, not {dtype}"
        return missing()

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> State:
        """Arrange codes in planes, and scales with their zero points."""
        scales = weight.scales.float().t().contiguous().view(torch.int32)
        exact = weight.scales.dtype == torch.float32
        state = State(
            _pack(weight.codes, plane_of(weight.group_size)),
            (scales & -16) | weight.zeros.t().to(torch.int32),
            (scales & 15 if exact else scales[:0]).to(torch.uint8),
            torch.zeros(most_tiles(weight.out_features), dtype=torch.int32, device=scales.device),
            weight.group_size,
            weight.in_features,
            _DTYPES.index(weight.scales.dtype),
        )
        if scales.device.type == "cuda":
            # A compiled model in CUDA graphs would copy these before every replay if it took them for inputs.
            for part in state[:4]:
                torch._dynamo.mark_static_address(part)
        return state

    def forward(self, inputs: Tensor, state: State) -> Tensor:
        """inputs `[rows, in_features]` times the weight."""
        rows, out_features = inputs.shape[0], state.pairs.shape[1]
        if rows == 0:
            return inputs.new_empty(0, out_features)
        if inputs.device.type == "cuda" and inputs.device.index != torch.cuda.current_device():
            with torch.cuda.device(inputs.device):  # Triton launches on the current device
                return self.forward(inputs, state)
        if rows >= DENSE_ROWS or inputs.dtype not in _DIRECT:
            return F.linear(inputs, self.dequantize(state, inputs.dtype))
        return multiply(inputs.contiguous(), state, _launch)

    def codes(self, state: State) -> Tensor:
        """Undo the arrangement of the words."""
        plane = plane_of(state.group_size)
        words = state.words.view(state.words.shape[0], -1, plane)
        planes = torch.stack([(words >> 4 * nibble) & 15 for nibble in range(4)], dim=2).to(torch.uint8)
        return planes.flatten(1)[:, : state.in_features].contiguous()

    def dequantize(self, state: State, dtype: torch.dtype) -> Tensor:
        """The weight as floats `[out, in]`; computed in float32, then cast."""
        from awq.kernels import triton_programs

        out_features, plane = state.pairs.shape[1], plane_of(state.group_size)
        out = torch.empty(out_features, state.in_features, dtype=dtype, device=state.words.device)
        block_n = 32 if plane == 64 else 64
        grid = (state.words.shape[1] // plane, -(-out_features // block_n))
        triton_programs.dequantize[grid](
            state.words,
            state.pairs,
            out,
            out_features,
            state.in_features,
            state.words.shape[1],
            GROUP=state.group_size,
            PLANE=plane,
            WHOLE=state.in_features % (4 * plane) == 0,
            BLOCK_N=block_n,
            PTX=_ptx(_device(out.device)),
            num_warps=4,
        )
        return out


def _launch(inputs: Tensor, state: State) -> tuple[Launch, bool]:
    """How a product is launched, and whether its program may contain NVIDIA's assembly."""
    device, (out_features, _) = _device(inputs.device), state.words.shape
    plane = plane_of(state.group_size)
    return launch_for(inputs.shape[0], out_features, state.in_features, plane, device), _ptx(device)


def _pack(codes: Tensor, plane: int) -> Tensor:
    """Words int16 `[out, chunks * plane]`; the last chunk is filled up with zeros."""
    codes = F.pad(codes, (0, -codes.shape[1] % (4 * plane)))
    planes = codes.view(codes.shape[0], -1, 4, plane)
    words = planes[:, :, 0].to(torch.int16)
    for nibble in range(1, 4):
        words |= planes[:, :, nibble].to(torch.int16) << 4 * nibble
    return words.flatten(1)


def _ptx(device: Device) -> bool:
    """Whether programs may contain NVIDIA's assembly; Triton's interpreter cannot run it."""
    return not device.hip and os.environ.get("TRITON_INTERPRET", "0") != "1"


@functools.cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(90, 4, 227 * 1024)  # Triton's interpreter: anything will do
    facts = torch.cuda.get_device_properties(device)
    return Device(
        10 * facts.major + facts.minor,
        facts.multi_processor_count,
        getattr(facts, "shared_memory_per_block_optin", 64 * 1024),
        torch.version.hip is not None,
    )


@functools.cache
def missing() -> str | None:
    """What this machine lacks for Triton on its GPU, as a sentence; None when nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; on Windows, triton-windows)"
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"Triton {version} is older than {oldest} (install a newer PyTorch)"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU here"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if 10 * capability[0] + capability[1] < _OLDEST_CAPABILITY:
            return f"Triton needs compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to start its programs (install gcc, or set CC)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Triton needs Python's header files to start its programs (install python3-dev)"
    return None

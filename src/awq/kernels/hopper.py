"""Products on Hopper GPUs (H100, H200) by CUDA programs of our own, compiled when first used.

`few_rows.cu` serves single tokens and small batches, `many_rows.cu` larger ones, both without rounding a
weight; for very many rows `dequantize.cu` writes the weight out as floats for a dense product. How the weight
lies is in `hopper_layout`, how programs are launched in `hopper_launch`. All of them are deterministic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.kernels import cuda_program
from awq.kernels.hopper_launch import DENSE_ROWS, Launch, Shape, launch_for, most_tiles
from awq.kernels.hopper_layout import BLOCK, TILE, codes_of, pack, pairs_of, parts_of
from awq.kernels.spec import LayerSpec
from awq.weight import QuantizedWeight

_DTYPES = (torch.float16, torch.bfloat16)
# As whole numbers in a state.
_DTYPES_OF_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_CAPABILITY = (9, 0)
_DEQUANTIZE_WARPS = 8


class State(NamedTuple):
    """A weight as the programs read it. They begin to while the launch ahead may still run: no kernel just
    ahead of a product may write its weight.

    blocks: uint8 `[out / 16, in / 128, bytes]`, see `hopper_layout`.
    low: uint8 `[out, groups]`, the lowest four bits of the scales where they are float32; else empty.
    counters: int32, zeros between products; programs that share a sum count themselves here, so that one
        layer must not be run on two streams at once.
    """

    blocks: Tensor
    low: Tensor
    counters: Tensor
    group_size: int
    dtype_of_scales: int

    @property
    def scales(self) -> Tensor:
        """Scales `[out, groups]`, exactly as they were given."""
        bits = pairs_of(self.blocks, self.group_size) & -16
        if self.low.numel():
            bits = bits | self.low
        return bits.view(torch.float32).to(_DTYPES_OF_SCALES[self.dtype_of_scales])

    @property
    def zeros(self) -> Tensor:
        """Zero points uint8 `[out, groups]`."""
        return (pairs_of(self.blocks, self.group_size) & 15).to(torch.uint8)


class Hopper:
    """CUDA programs for compute capability 9.0."""

    name = "hopper"
    any_shape = False
    state_type = State

    def refuses(self, spec: LayerSpec) -> str | None:
        """Why a layer cannot be served."""
        if spec.device != "cuda":
            return f"it runs on Hopper GPUs, not on {spec.device}"
        if spec.bits > 4:
            return f"{spec.bits} bits do not fit a nibble"
        if spec.dtype not in _DTYPES:
            dtype = str(spec.dtype).removeprefix("torch.")
            return f"it multiplies float16 and bfloat16, not {dtype}"
        if spec.group_size not in (32, 64) and spec.group_size % BLOCK:
            return f"it takes groups of 32, 64 or a multiple of {BLOCK}, not {spec.group_size}"
        if spec.out_features % TILE:
            return f"{spec.out_features} output channels do not divide by {TILE}"
        if spec.in_features % BLOCK:
            return f"{spec.in_features} input channels do not divide by {BLOCK}"
        return missing()

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> State:
        """Arrange codes, and scales with their zero points, in blocks."""
        scales = weight.scales.float().contiguous().view(torch.int32)
        exact = weight.scales.dtype == torch.float32
        state = State(
            pack(weight.codes, (scales & -16) | weight.zeros.to(torch.int32), weight.group_size),
            (scales & 15 if exact else scales[:0]).to(torch.uint8),
            torch.zeros(most_tiles(weight.out_features), dtype=torch.int32, device=scales.device),
            weight.group_size,
            _DTYPES_OF_SCALES.index(weight.scales.dtype),
        )
        if scales.device.type == "cuda":
            # A compiled model in CUDA graphs would copy these before every replay if it took them for inputs.
            for part in state[:3]:
                torch._dynamo.mark_static_address(part)
        return state

    def forward(self, inputs: Tensor, state: State) -> Tensor:
        """inputs `[rows, in_features]` times the weight."""
        rows = inputs.shape[0]
        if rows == 0:
            return inputs.new_empty(0, state.blocks.shape[0] * TILE)
        if inputs.device.index != torch.cuda.current_device():
            with torch.cuda.device(inputs.device):  # programs are started on the current device
                return self.forward(inputs, state)
        if rows >= DENSE_ROWS or inputs.dtype not in _DTYPES:
            return F.linear(inputs, self.dequantize(state, inputs.dtype))
        inputs = inputs.contiguous()
        return _multiply(inputs if inputs.data_ptr() % 16 == 0 else inputs.clone(), state)

    def codes(self, state: State) -> Tensor:
        """The codes of the blocks."""
        return codes_of(state.blocks)

    def dequantize(self, state: State, dtype: torch.dtype) -> Tensor:
        """The weight as floats `[out, in]`; computed in float32, then cast."""
        if dtype not in _DTYPES:
            return QuantizedWeight(self.codes(state), state.scales, state.zeros).dequantize(dtype)
        tiles, across, _ = state.blocks.shape
        out = torch.empty(tiles * TILE, across * BLOCK, dtype=dtype, device=state.blocks.device)
        constants = (("BF16", int(dtype == torch.bfloat16)), ("PARTS", parts_of(state.group_size)))
        launch = Launch(
            "dequantize", constants, -(-tiles * across // _DEQUANTIZE_WARPS), 32 * _DEQUANTIZE_WARPS, 0
        )
        arguments = (state.blocks.data_ptr(), out.data_ptr(), tiles * across, across)
        _starter(launch, out.device.index)(arguments)
        return out


class _Started(NamedTuple):
    """A loaded program that is given its arguments; what else a product needs to know of its launch."""

    start: Callable[..., None]
    partial: int
    block_rows: int


# By what a product is, for it is found hundreds of times for every token.
_started: dict[tuple[Any, ...], _Started] = {}


def _multiply(inputs: Tensor, state: State) -> Tensor:
    """inputs `[rows, in_features]`, contiguous and on the current device, times the weight."""
    blocks, (rows, in_features), dtype, device = state.blocks, inputs.shape, inputs.dtype, inputs.device
    out_features = blocks.shape[0] * TILE
    key = (rows, blocks.shape, dtype, device)
    started = _started.get(key)
    if started is None:
        shape = Shape(out_features, in_features, parts_of(state.group_size))
        launch = launch_for(rows, shape, dtype == torch.bfloat16, _processors(device.index))
        started = _Started(_starter(launch, device.index), launch.partial, launch.block_rows)
        _started[key] = started
    out = inputs.new_empty(rows, out_features)
    codes, target, measures = blocks.data_ptr(), out.data_ptr(), (rows, out_features, in_features)
    if not started.partial:
        started.start((codes, inputs.data_ptr(), target, *measures))
        return out
    partial = torch.empty(started.partial, dtype=torch.float32, device=device)
    inputs_map = cuda_program.rows_map(
        inputs.data_ptr(), rows, in_features, dtype == torch.bfloat16, started.block_rows
    )
    arguments = (codes, target, partial.data_ptr(), state.counters.data_ptr(), *measures)
    started.start(arguments, structure=int(inputs_map.getPtr()))
    return out


@functools.cache
def _starter(launch: Launch, device: int) -> Callable[..., None]:
    """What starts a launch with the arguments that it is given; compiles the program when it is new."""
    start = cuda_program.load(
        f"{launch.program}.cu", launch.program, dict(launch.constants), device, launch.shared
    )
    return functools.partial(start, (launch.programs, 1, 1), launch.threads, early=True)


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def missing() -> str | None:
    """What this machine lacks for these programs, as a sentence; None when nothing."""
    reason = cuda_program.missing()
    if reason is not None:
        return reason
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability != _CAPABILITY:
            return f"it is written for compute capability 9.0, not for {capability[0]}.{capability[1]}"
    return None

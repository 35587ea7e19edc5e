"""PyTorch's own int4 product for CPUs: `aten::_weight_int4pack_mm_for_cpu`, where ours cannot be compiled.

It takes bfloat16 activations (others are cast), groups of 32, 64, 128 or 256 and row counts that divide by
16. Its arrangement of the codes depends on the instruction set, so it is made at load time and never saved;
how nibbles lie in it is learned once per process by packing known codes, which lets codes be recovered
exactly and a layer hold its weights only once.

Median ms for one 4096 x 4096 layer in groups of 128, two AVX2 cores, torch 2.13:

    rows                         1     16     64    256   1024
    this operator              1.2    6.3     37    107    599
    dense bfloat16             1.7   24.8    100    408   1617
    dense float32              2.6   11.1     20     64    290
    dequantizing, once          74

From a few hundred rows on it is therefore faster to dequantize and use the dense product, in float32 unless
the processor multiplies bfloat16 itself.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.kernels.spec import LayerSpec
from awq.weight import QuantizedWeight

_GROUPS = (32, 64, 128, 256)
_ROWS_PER_BLOCK = (16, 32, 64)
# From this many rows on, dequantizing pays.
_DENSE_ROWS = 384

_pack = torch._convert_weight_to_int4pack_for_cpu
_multiply = torch.ops.aten._weight_int4pack_mm_for_cpu


class State(NamedTuple):
    """The operator's arrangement; scale and offset bfloat16 `[groups, out, 2]`: w = (q - 8) s + offset."""

    packed: Tensor
    scale_and_offset: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int


class CpuInt4:
    """The operator, with a dense path for many rows."""

    name = "cpu-int4"
    any_shape = False
    state_type = State

    def refuses(self, spec: LayerSpec) -> str | None:
        """Why a layer cannot be served."""
        if spec.device != "cpu":
            return f"it runs on the CPU, not on {spec.device}"
        if spec.bits > 4:
            return f"{spec.bits} bits do not fit a nibble"
        if spec.group_size not in _GROUPS:
            return f"it takes groups of {_GROUPS}, not {spec.group_size}"
        if spec.out_features % 16:
            return f"{spec.out_features} output channels do not divide by 16"
        if spec.in_features % 32:
            return f"{spec.in_features} input channels do not divide by 32"
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> State:
        """Arrange the codes for this machine."""
        scales, zeros = weight.scales.float(), weight.zeros.float()
        pairs = torch.stack((scales, (8 - zeros) * scales), dim=-1).to(torch.bfloat16)
        return State(
            _pack(weight.codes.to(torch.int32), 1),
            pairs.transpose(0, 1).contiguous(),
            weight.scales,
            weight.zeros,
            weight.group_size,
        )

    def forward(self, inputs: Tensor, state: State) -> Tensor:
        """The operator for few rows, the dense product for many."""
        if inputs.shape[0] >= _DENSE_ROWS and state.scales.shape[0] % 32 == 0:
            return self._dense(inputs, state)
        # The operator refuses strided rows; both steps are free where there is nothing to do.
        cast = inputs.to(torch.bfloat16).contiguous()
        return _multiply(cast, state.packed, state.group_size, state.scale_and_offset).to(inputs.dtype)

    def codes(self, state: State) -> Tensor:
        """Undo the arrangement."""
        rows, columns = state.scales.shape[0], state.scales.shape[1] * state.group_size
        return _unpack(state.packed, rows, columns)

    def _dense(self, inputs: Tensor, state: State) -> Tensor:
        dtype = inputs.dtype if inputs.dtype == torch.bfloat16 and _native_bfloat16() else torch.float32
        weight = QuantizedWeight(self.codes(state), state.scales, state.zeros).dequantize(dtype)
        return F.linear(inputs.to(dtype), weight).to(inputs.dtype)


def _unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Codes uint8 `[rows, columns]` out of the operator's arrangement."""
    known = _arrangement(rows % 64 == 0) if rows % 32 == 0 else None
    return _by_identity(packed, rows, columns) if known is None else _by_blocks(packed, rows, columns, *known)


def _by_blocks(packed: Tensor, rows: int, columns: int, width: int, row_of_nibble: list[int]) -> Tensor:
    """Codes from blocks of `width` rows, laid out column by column with the nibbles of a column in order."""
    blocks = packed.reshape(-1).view(torch.uint8).view(rows // width, columns, width // 2)
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    ordered = torch.empty_like(nibbles)
    ordered[..., row_of_nibble] = nibbles
    return ordered.transpose(1, 2).reshape(rows, columns)


def _by_identity(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Codes by multiplying with the identity: exact in bfloat16, whatever the arrangement, but slow."""
    group = max(size for size in _GROUPS if columns % size == 0)
    unit = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).expand(columns // group, rows, 2).contiguous()
    eye = torch.eye(columns, dtype=torch.bfloat16)
    products = [_multiply(part, packed, group, unit) for part in eye.split(512)]
    return (torch.cat(products).t() + 8).to(torch.uint8).contiguous()


@functools.cache
def _arrangement(by_64: bool) -> tuple[int, list[int]] | None:
    """Rows of a block, and the row held by each nibble of a column of it, learned from known codes.

    None when this version of PyTorch arranges the codes in a way unknown here.
    """
    rows, columns = 128 if by_64 else 96, 64
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.int32)
    packed = _pack(probe, 1)
    number = torch.arange(rows, dtype=torch.int32).unsqueeze(1).expand(rows, columns).contiguous()
    low, high = (_pack(digit, 1).reshape(-1).view(torch.uint8) for digit in (number % 16, number // 16))
    for width in _ROWS_PER_BLOCK:
        # The bytes of the first block's first column tell both digits of the row in each nibble.
        digits = [torch.stack((part & 15, part >> 4), dim=-1).flatten() for part in (low, high)]
        order = (digits[0][:width].long() + 16 * digits[1][:width].long()).tolist()
        if rows % width or sorted(order) != list(range(width)):
            continue
        if torch.equal(_by_blocks(packed, rows, columns, width, order).int(), probe):
            return width, order
    return None


@functools.cache
def _native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())

"""Our own products for CPUs, in C++ (`cpp/w4.cpp`), for codes of any width and any number of rows.

Activations are written in whole numbers, chunk by chunk of at most 128 input channels, and multiplied with
the codes in whole numbers: exact sums, so that a row's result depends neither on the rows beside it nor on
the number of threads. How exact the activations are is a number of signed bytes:

    bytes  for                 relative error of a product, normal activations, before the result is rounded
    3      float32             3e-7 (a float32 product: 3e-7)
    2      float16, bfloat16   7e-5 at most (rounding the result: 2e-4 and 2e-3)
    1      `cpu-w4a8`          6e-3

`cpu-w4a8` is therefore never chosen by itself. Any group that divides by 8 and any number of outputs is
served. Codes of 5 to 8 bits are multiplied nibble by nibble: twice the work, and twice the bytes, of 4 bits.
"""

from __future__ import annotations

import itertools
import math
import mmap
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from awq.errors import KernelError
from awq.kernels import native
from awq.kernels.spec import LayerSpec
from awq.weight import QuantizedWeight

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_BLOCK = 64
_HUGE = 2 << 20
# Layers in large pages: each takes two of the 65,530 mappings that Linux allows a process.
_MOST_HUGE = 10_000
_huge = itertools.count()


class State(NamedTuple):
    """Codes uint8 `[blocks of 64 outputs, planes, in / 8, 64, 4]`; scales and zero points `[groups, out]`.

    There are two planes of nibbles where codes have more than 4 bits, and one otherwise.
    """

    packed: Tensor
    scales_by_group: Tensor
    zeros_by_group: Tensor
    group_size: int
    planes: int

    @property
    def scales(self) -> Tensor:
        """Those of the weight, `[out, groups]`."""
        return self.scales_by_group.t()

    @property
    def zeros(self) -> Tensor:
        """Those of the weight, `[out, groups]`."""
        return self.zeros_by_group.t()


class CpuNative:
    """Products with activations in the precision of their dtype."""

    name = "cpu-w4a16"
    any_shape = True
    state_type = State

    def refuses(self, spec: LayerSpec) -> str | None:
        """Why a layer cannot be served."""
        if spec.device != "cpu":
            return f"it runs on the CPU, not on {spec.device}"
        if spec.group_size % 8:
            return f"groups of {spec.group_size} do not divide by 8"
        found = load()
        return found if isinstance(found, str) else None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> State:
        """Arrange the codes in blocks."""
        return _prepare(loaded(), weight)

    def forward(self, inputs: Tensor, state: State) -> Tensor:
        """The product for inputs of any shape; a row with NaN or infinity in it becomes NaN."""
        return _multiply(loaded(), inputs, state, self.digits(inputs.dtype))

    def codes(self, state: State) -> Tensor:
        """Undo the arrangement."""
        return _codes(loaded(), state)

    def digits(self, dtype: torch.dtype) -> int:
        """Bytes of an activation."""
        return 2 if dtype in (torch.float16, torch.bfloat16) else 3


class CpuW4A8(CpuNative):
    """Activations rounded to 8 bits: faster for many rows, and about as far off as bfloat16 squared."""

    name = "cpu-w4a8"

    def digits(self, dtype: torch.dtype) -> int:
        """One byte, whatever the dtype."""
        return 1


def load() -> native.Native | str:
    """The library, or why there is none; see `native.load`."""
    return native.load(is_right)


def loaded() -> native.Native:
    """The library.

    Raises:
        KernelError: there is none.
    """
    found = load()
    if isinstance(found, str):
        raise KernelError(f"the C++ product for CPUs cannot be used: {found}")
    return found


def _prepare(found: native.Native, weight: QuantizedWeight) -> State:
    rows, columns = weight.codes.shape
    codes = weight.codes.contiguous()
    blocks = -(-rows // _BLOCK)
    planes = 1 if weight.bits <= 4 else 2
    shape = (blocks, planes, columns // 8, _BLOCK, 4)
    packed = memory(math.prod(shape)).view(shape)
    threads = torch.get_num_threads()
    found.library.openawq_pack(codes.data_ptr(), rows, columns, planes, packed.data_ptr(), threads)
    scales = weight.scales if weight.scales.dtype in KINDS else weight.scales.float()
    zeros = weight.zeros.t().contiguous()
    return State(packed, scales.t().contiguous(), zeros, columns // scales.shape[1], planes)


def memory(size: int) -> Tensor:
    """Bytes `[size]`, as far as the system allows in pages of 2 MB, which are found faster than small ones.

    A single row with weights out of the cache is 6 to 13 % faster for it. Only whole pages are made large, so
    that nothing is taken beyond `size`.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < _HUGE or next(_huge) >= _MOST_HUGE:
        return torch.empty(size, dtype=torch.uint8)
    try:
        mapping = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return torch.empty(size, dtype=torch.uint8)
    offset = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % _HUGE
    with suppress(OSError):  # a system without them
        mapping.madvise(advice, offset, size // _HUGE * _HUGE)
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=offset, count=size)


def _multiply(found: native.Native, inputs: Tensor, state: State, digits: int) -> Tensor:
    if inputs.dtype not in KINDS:
        return _multiply(found, inputs.float(), state, digits).to(inputs.dtype)
    scales, zeros = state.scales_by_group, state.zeros_by_group
    outputs = scales.shape[1]
    *lead, columns = inputs.shape
    if len(lead) == 1 and inputs.stride(1) == 1:  # rows may lie apart
        stride = inputs.stride(0)
    else:
        inputs, stride = inputs.contiguous(), columns
    rows = math.prod(lead)
    # No copies, unless the state has been through something that made its tensors anew.
    scales, zeros = scales.contiguous(), zeros.contiguous()
    out = inputs.new_empty((*lead, outputs))
    failed = found.library.openawq_w4(
        inputs.data_ptr(),
        stride,
        KINDS[inputs.dtype],
        rows,
        columns,
        outputs,
        state.packed.data_ptr(),
        scales.data_ptr(),
        KINDS[scales.dtype],
        zeros.data_ptr(),
        state.group_size,
        state.planes,
        out.data_ptr(),
        digits,
        torch.get_num_threads(),
    )
    if failed:
        raise KernelError(f"no memory for {rows} x {columns} activations in {digits} bytes each")
    return out


def _codes(found: native.Native, state: State) -> Tensor:
    groups, rows = state.scales_by_group.shape
    columns = groups * state.group_size
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    threads = torch.get_num_threads()
    packed = state.packed.data_ptr()
    found.library.openawq_unpack(packed, rows, columns, state.planes, codes.data_ptr(), threads)
    return codes


def is_right(found: native.Native) -> bool:
    """Whether a library just loaded multiplies as it should: a moment's work against a broken compiler."""
    return all(_is_right(found, bits) for bits in (4, 8))


def _is_right(found: native.Native, bits: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (72, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (72, 2), generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.rand(72, 2, generator=generator), zeros, bits)
    inputs = torch.randn(45, 64, generator=generator)
    state = _prepare(found, weight)
    expected = inputs @ weight.dequantize().t()
    off = (_multiply(found, inputs, state, 3) - expected).norm() / expected.norm()
    return torch.equal(_codes(found, state), codes) and float(off) < 1e-5

"""Which kernel serves a layer, and why."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from awq.errors import KernelError
from awq.kernels.cpu_int4 import CpuInt4
from awq.kernels.cpu_native import CpuNative, CpuW4A8
from awq.kernels.hopper import Hopper
from awq.kernels.humming import Humming
from awq.kernels.spec import LayerSpec
from awq.kernels.torch_dequant import TorchDequant
from awq.kernels.triton_int4 import TritonInt4
from awq.weight import QuantizedWeight

__all__ = ["Choice", "Kernel", "LayerSpec", "choose", "kernel_choices", "kernel_named", "kernel_names"]


class Kernel(Protocol):
    """A way to multiply.

    A kernel owns its arrangement of the codes. Its state, a `state_type`, is a named tuple of tensors, then
    whole numbers, so that any kernel can be handed through an operator of PyTorch; its `scales` and `zeros`
    `[out_features, groups]`, fields or computed, are those of the weight.
    """

    name: str
    # Whether `forward` takes inputs of any shape `[..., in_features]`; only rows otherwise.
    any_shape: bool
    state_type: Any

    def refuses(self, spec: LayerSpec) -> str | None:
        """Why the kernel cannot serve a layer, or None when it can."""

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Any:
        """Arrange a weight for products with activations of `dtype`."""

    def forward(self, inputs: Tensor, state: Any) -> Tensor:
        """inputs `[rows, in_features]` times the weight: `[rows, out_features]` in the inputs' dtype."""

    def codes(self, state: Any) -> Tensor:
        """The codes uint8 `[out_features, in_features]`, recovered exactly from the arrangement."""


# Fastest first; the last one serves everything and is what the others are tested against.
_KERNELS: tuple[Kernel, ...] = (CpuNative(), CpuInt4(), Hopper(), TritonInt4(), TorchDequant())
# Only for who asks: less exact than its dtype, or compiled for each size of batch as it comes.
_ON_REQUEST: tuple[Kernel, ...] = (CpuW4A8(), Humming())
# Names by which users know a kind of kernel, and which of ours come first then, where they serve.
_KINDS = {"marlin": ("humming",)}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel and the reason for it, as a sentence."""

    kernel: Kernel
    reason: str


def kernel_names() -> tuple[str, ...]:
    """Names of the kernels."""
    return tuple(kernel.name for kernel in (*_KERNELS, *_ON_REQUEST))


def kernel_choices() -> tuple[str, ...]:
    """Names that `choose` takes: those of the kernels, and `marlin` for the nearest there is to it."""
    return (*kernel_names(), *_KINDS)


def kernel_named(name: str) -> Kernel:
    """The kernel of a name.

    Raises:
        KernelError: there is none.
    """
    for kernel in (*_KERNELS, *_ON_REQUEST):
        if kernel.name == name:
            return kernel
    raise KernelError(f"kernel {name!r} is unknown; known are: {', '.join(kernel_choices())}")


def choose(spec: LayerSpec, prefer: str | None = None) -> Choice:
    """The kernel for a layer.

    Args:
        spec: the layer.
        prefer: insist on this kernel; or, with the name of a kind (`marlin`), take one of that kind where it
            serves the layer, and the fastest otherwise.

    Raises:
        KernelError: the preferred one does not exist or cannot serve the layer.
    """
    kind = _KINDS.get(prefer or "", ())
    if prefer is not None and not kind:
        kernel = kernel_named(prefer)
        reason = kernel.refuses(spec)
        if reason:
            raise KernelError(f"kernel {prefer!r} cannot serve this layer: {reason}")
        return Choice(kernel, f"{prefer}: asked for")
    refusals: list[str] = []
    for kernel in (*map(kernel_named, kind), *_KERNELS):
        reason = kernel.refuses(spec)
        if reason is None and kernel.name in kind:
            return Choice(kernel, f"{kernel.name}: what there is of kind {prefer}")
        if reason is None:
            because = f" ({'; '.join(refusals)})" if refusals else ""
            return Choice(kernel, f"{kernel.name}: the fastest that serves {spec}{because}")
        refusals.append(f"not {kernel.name}: {reason}")
    raise KernelError(f"no kernel serves {spec}: {'; '.join(refusals)}")

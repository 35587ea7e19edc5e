"""Products as an operator of PyTorch, so that autograd and `torch.compile` see one node with a known shape.

A kernel's state travels as its tensors and its numbers. Without gradients and outside of compilation the
kernel is called directly: the operator's machinery costs as much as a small product. On that way each step
counts. A layer is run between megabytes of weights, which leave nothing of Python and PyTorch in the caches:
even to ask a tensor for its device takes 7 us there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awq.kernels.registry import Kernel, kernel_named
from awq.weight import QuantizedWeight


def multiply(inputs: Tensor, kernel: Kernel, state: Any, out_features: int) -> Tensor:
    """inputs `[..., in_features]` times a prepared weight: `[..., out_features]`.

    The result has the inputs' dtype or, within `torch.autocast`, the dtype that it asks for. Gradients flow
    to the inputs; the codes have none.
    """
    device = "cpu" if inputs.is_cpu else inputs.device.type
    if torch.is_autocast_enabled(device):
        inputs = inputs.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return multiply(inputs, kernel, state, out_features)
    direct = not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and inputs.requires_grad)
    if direct and kernel.any_shape:
        return kernel.forward(inputs, state)
    rows = inputs.reshape(-1, inputs.shape[-1])
    if direct:
        out = kernel.forward(rows, state)
    else:
        tensors = [part for part in state if isinstance(part, Tensor)]
        numbers = [part for part in state if not isinstance(part, Tensor)]
        out = torch.ops.openawq.multiply(rows, tensors, numbers, kernel.name, out_features)
    return out.view(*inputs.shape[:-1], out_features)


@torch.library.custom_op("openawq::multiply", mutates_args=())
def _multiply(
    inputs: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], kernel: str, out_features: int
) -> Tensor:
    chosen = kernel_named(kernel)
    return chosen.forward(inputs, chosen.state_type(*tensors, *numbers))


@_multiply.register_fake
def _(
    inputs: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], kernel: str, out_features: int
) -> Tensor:
    return inputs.new_empty(inputs.shape[0], out_features)


@torch.library.custom_op("openawq::multiply_transposed", mutates_args=())
def _multiply_transposed(
    outputs: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], kernel: str, in_features: int
) -> Tensor:
    chosen = kernel_named(kernel)
    state = chosen.state_type(*tensors, *numbers)
    return outputs @ QuantizedWeight(chosen.codes(state), state.scales, state.zeros).dequantize(outputs.dtype)


@_multiply_transposed.register_fake
def _(
    outputs: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], kernel: str, in_features: int
) -> Tensor:
    return outputs.new_empty(outputs.shape[0], in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activations, tensors, numbers, kernel, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers, ctx.kernel, ctx.in_features = list(numbers), kernel, activations.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    towards_inputs = torch.ops.openawq.multiply_transposed(
        grad.contiguous(), tensors, ctx.numbers, ctx.kernel, ctx.in_features
    )
    return towards_inputs, [None] * len(tensors), None, None, None


_multiply.register_autograd(_backward, setup_context=_keep)

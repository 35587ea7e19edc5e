"""One product for several quantized layers that read the same tensor (q/k/v, gate/up).

The rows of a weight do not know of one another, so the rows of several layers can lie in one arrangement of
one kernel, be multiplied at once, and be told apart again. Nothing else about the layers changes: each stays
where it is, with its name, its bias and its tensors when it is saved.

The layer that runs first multiplies for all; the others take their part if they are given the very tensor
that it was given, unchanged, under the same autograd and autocast. If they are not, they multiply for
themselves: with the rows of all, which is slower and as right. A part is a view into the whole product.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from awq.kernels import Choice, LayerSpec, choose
from awq.weight import QuantizedWeight

if TYPE_CHECKING:
    from awq.nn.linear import QuantLinear


class Merge:
    """Quantized layers that are multiplied at once, in the order in which they run.

    Layers that `apart_because` has nothing against; making one merges them, and `undo` ends it.
    """

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        self.members = tuple(members)
        ends = [0]
        for member in self.members:
            ends.append(ends[-1] + member.out_features)
        self.out_features = ends[-1]
        self._slices = [slice(*pair) for pair in itertools.pairwise(ends)]
        # The tensor that was multiplied last, under what conditions, and the product: one tuple, so that
        # another thread sees all of it or nothing.
        self._last: tuple[Tensor, Any, Tensor] | None = None
        dtype, prefer = self.members[0].compute_dtype, self.members[0]._prefer
        for member, rows in zip(self.members, self._slices, strict=True):
            member._release()
            member._merge, member._rows = self, rows
        self.prepare(dtype, prefer)

    def prepare(self, dtype: torch.dtype | None, prefer: str | None) -> Choice:
        """Arrange the codes of all members for one kernel; see `QuantLinear.prepare`."""
        self._last = None
        for member in self.members:
            member._prefer = prefer
        if apart_because(self.members, dtype) is not None:  # some have been moved, and others have not
            self.undo()
            first, *_ = [member.prepare(dtype, prefer) for member in self.members]
            return first
        weights = [member.weight_canonical() for member in self.members]
        weight = QuantizedWeight(
            torch.cat([each.codes for each in weights]),
            torch.cat([each.scales for each in weights]),
            torch.cat([each.zeros for each in weights]),
            weights[0].bits,
        )
        dtype = dtype or weight.scales.dtype
        choice = choose(_spec(self.members[0], dtype, self.out_features), prefer)
        state = choice.kernel.prepare(weight, dtype)
        for member in self.members:
            member._arranged(choice, state, dtype)
        return choice

    def product(self, member: QuantLinear, inputs: Tensor) -> Tensor:
        """inputs `[..., in_features]` to the member's part, `[..., out_features]`, its bias not added."""
        first = self.members[0]
        if member is first:
            out = first._product(inputs, self.out_features)
            self._last = (inputs, _marks(inputs), out)
        else:
            last = self._last
            # A hook may have changed the tensor in place, and tensors of inference mode do not tell.
            if (
                last is None
                or last[0] is not inputs
                or last[1] != _marks(inputs)
                or member._forward_pre_hooks
            ):
                out = first._product(inputs, self.out_features)
            else:
                out = last[2]
                if member is self.members[-1]:
                    self._last = None
        rows = member._rows
        return out.narrow(-1, rows.start, rows.stop - rows.start)

    def undo(self) -> None:
        """Make the members layers of their own again; each arranges its codes when it is next used."""
        self._last = None
        self.members[0]._release()
        for member in self.members:
            member._merge, member._rows = None, slice(None)


def apart_because(layers: Sequence[QuantLinear], dtype: torch.dtype | None = None) -> str | None:
    """Why layers cannot be multiplied at once with activations of `dtype`, or None when they can.

    They can if they are alike but for their number of rows, in memory, and if the kernel that each would get
    is the one that all together get.
    """
    if any(layer.is_away or layer.is_offloaded for layer in layers):
        return "their codes are moved in and out of memory"
    alike = {
        (
            layer.in_features,
            layer.group_size,
            layer.bits,
            layer.compute_dtype,
            layer._prefer,
            *((part.dtype, part.device) for part in layer.held_tensors() if part is not layer.bias),
        )
        for layer in layers
    }
    if len(alike) > 1:
        return "they differ in inputs, groups, bits, types or devices"
    dtype = dtype or layers[0].compute_dtype
    sizes = [layer.out_features for layer in layers]
    kernels = {
        choose(_spec(layers[0], dtype, size), layers[0]._prefer).kernel.name for size in (*sizes, sum(sizes))
    }
    return f"they get different kernels ({', '.join(sorted(kernels))})" if len(kernels) > 1 else None


def _spec(layer: QuantLinear, dtype: torch.dtype, out_features: int) -> LayerSpec:
    device = layer.held_tensors()[0].device.type
    return LayerSpec(device, dtype, layer.in_features, out_features, layer.group_size, layer.bits)


def _marks(inputs: Tensor) -> tuple[Any, ...]:
    """What else than the tensor's identity a product depends on."""
    if torch.compiler.is_compiling():
        return ()  # a traced forward has one order, in which nothing of this changes
    device = "cpu" if inputs.is_cpu else inputs.device.type
    version = -1 if inputs.is_inference() else inputs._version
    return version, torch.is_grad_enabled(), torch.is_autocast_enabled(device)

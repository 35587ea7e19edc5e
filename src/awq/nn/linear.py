"""A linear layer on a quantized weight.

It is born with the checkpoint's tensors as buffers (GEMM layout), so that any loader can fill it. At the
first product, or at `prepare`, the codes are arranged for the kernel that fits, and the checkpoint's copy is
given up: a weight is held once. Saving recovers the checkpoint's tensors from that arrangement, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from awq.formats import gemm
from awq.kernels import Choice, LayerSpec, choose
from awq.weight import QuantizedWeight

_PACKED = ("qweight", "qzeros", "scales")


class QuantLinear(nn.Module):
    """Computes x Wᵀ + b for a weight of 4-bit codes.

    Args:
        in_features, out_features: measures of the weight.
        group_size: input channels that share a scale.
        bits: width of a code.
        bias: whether there is one.
        dtype: of the bias.
        scales_dtype: of the scales, as stored; casting them to the activations' dtype would lose precision.
        device: where the buffers are made; `meta` to have them filled by a loader.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = 128,
        bits: int = 4,
        bias: bool = False,
        dtype: torch.dtype = torch.float16,
        scales_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.bits = group_size, bits
        shapes = gemm.packed_shapes(out_features, in_features, group_size, scales_dtype)
        for name, (kind, shape) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self._prefer: str | None = None
        self._choice: Choice | None = None
        self._state: Any = None

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> QuantLinear:
        """A layer on a canonical weight, with `bias` `[out_features]` or none."""
        layer = cls(
            weight.in_features,
            weight.out_features,
            weight.group_size,
            weight.bits,
            bias is not None,
            scales_dtype=weight.scales.dtype,
            device="meta",
        )
        for name, tensor in gemm.pack(weight).items():
            setattr(layer, name, tensor)
        layer.bias = bias
        return layer

    def prepare(self, dtype: torch.dtype | None = None, prefer: str | None = None) -> Choice:
        """Arrange the codes for the kernel that fits; returns it with the reason.

        Args:
            dtype: of the activations to come; that of the scales by default.
            prefer: insist on a kernel, from now on.

        Raises:
            KernelError: the preferred kernel cannot serve this layer.
        """
        self._prefer = prefer or self._prefer
        weight = self.weight_canonical()
        dtype = dtype or weight.scales.dtype
        spec = LayerSpec(
            weight.codes.device.type, dtype, self.in_features, self.out_features, self.group_size, self.bits
        )
        choice = choose(spec, self._prefer)
        self._state = choice.kernel.prepare(weight, dtype)
        self._choice = choice
        for name in _PACKED:
            setattr(self, name, None)
        return choice

    def weight_canonical(self) -> QuantizedWeight:
        """The weight as codes, scales and zero points: exactly what was loaded."""
        if self._choice is None:
            return gemm.unpack({name: getattr(self, name) for name in _PACKED}, self.bits)
        codes = self._choice.kernel.codes(self._state)
        return QuantizedWeight(codes, self._state.scales, self._state.zeros, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats `[out_features, in_features]`."""
        return self.weight_canonical().dequantize(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs `[..., in_features]` to `[..., out_features]`, in the inputs' dtype."""
        if self._choice is None:
            self.prepare(inputs.dtype)
        rows = inputs.reshape(-1, self.in_features)
        out = self._choice.kernel.forward(rows, self._state)  # type: ignore[union-attr]
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.view(*inputs.shape[:-1], self.out_features)

    def _release(self) -> None:
        """Go back to the checkpoint's tensors, which can be moved and saved."""
        if self._choice is None:
            return
        packed = gemm.pack(self.weight_canonical())
        self._choice = self._state = None
        for name, tensor in packed.items():
            setattr(self, name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # A kernel's arrangement belongs to its device and dtype: moved layers arrange anew when next used.
        self._release()
        before = {name: getattr(self, name) for name in _PACKED}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                # Casts are meant for activations. Rounded scales would change every weight.
                setattr(self, name, tensor.to(moved.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # An arrangement depends on the processor: in a pickle its bytes could come to mean other codes.
        state = self.__dict__.copy()
        if self._choice is not None:
            state |= {"_choice": None, "_state": None}
            state["_buffers"] = self._buffers | gemm.pack(self.weight_canonical())
        return state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._choice is not None:
            for name, tensor in gemm.pack(self.weight_canonical()).items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._release()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Measures and kernel."""
        kernel = self._choice.kernel.name if self._choice else "not prepared"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}, kernel={kernel}"
        )

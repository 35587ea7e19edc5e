"""A linear layer on a quantized weight.

It is born with the checkpoint's tensors as buffers, so that any loader can fill it. At the first product, or
at `prepare`, the codes are arranged for the kernel that fits, and the checkpoint's copy is given up: a weight
is held once. Saving recovers the checkpoint's tensors from that arrangement, exactly.

It is a `torch.nn.Linear`, so that what looks for linear layers (PEFT's adapters, among others) finds it. Its
`weight` is computed when asked for, and cannot be written to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.errors import ConfigError, KernelError
from awq.formats import get_format
from awq.kernels import Choice, LayerSpec, choose, multiply
from awq.weight import QuantizedWeight

if TYPE_CHECKING:
    from awq.nn.merge import Merge


class DequantizedWeight(Tensor):
    """What `QuantLinear.weight` gives: a copy. Writing to it would change nothing, and is refused."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The values, as a plain tensor."""
        return self.as_subclass(Tensor).detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ConfigError(
            "the weight of a quantized layer cannot be changed (by merging an adapter, for instance): call "
            "model.dequantize() on the quantized model, load the adapter onto the result and merge there"
        )


class QuantLinear(nn.Linear):
    """Computes x Wᵀ + b for a weight of codes.

    Args:
        in_features, out_features: measures of the weight.
        group_size: input channels that share a scale.
        bits: width of a code.
        bias: whether there is one.
        dtype: of the activations expected, and of the bias.
        scales_dtype: of the scales, as stored; casting them to the activations' dtype would lose precision.
        device: where the buffers are made; `meta` to have them filled by a loader.
        layout: of the buffers, a name in `awq.formats`.
    """

    bias: Tensor | None  # type: ignore[assignment]

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
        layout: str = "gemm",
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a float weight
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.bits = group_size, bits
        self.compute_dtype = dtype
        self.layout = layout
        # Stands in the place of a GPT-2 `Conv1D`, and is dequantized to one.
        self.of_conv1d = False
        shapes = get_format(layout).packed_shapes(out_features, in_features, group_size, scales_dtype, bits)
        self._packed = tuple(shapes)
        for name, (kind, shape) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self._prefer: str | None = None
        self._choice: Choice | None = None
        self._state: Any = None
        # Layers that are multiplied together share one state, of which each has some rows.
        self._merge: Merge | None = None
        self._rows = slice(None)
        # transformers initialises whatever does not say that it needs none.
        self._is_hf_initialized = True

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> QuantLinear:
        """A layer on a canonical weight, with `bias` `[out_features]` or none."""
        layer = cls(
            weight.in_features,
            weight.out_features,
            weight.group_size,
            weight.bits,
            bias is not None,
            dtype=weight.scales.dtype if bias is None else bias.dtype,
            scales_dtype=weight.scales.dtype,
            device="meta",
            layout="gemm" if weight.bits == 4 else "codes",
        )
        for name, tensor in get_format(layer.layout).pack(weight).items():
            setattr(layer, name, tensor)
        layer.bias = bias
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as floats `[out_features, in_features]` in the activations' dtype, computed anew."""
        shape = (self.out_features, self.in_features)
        if self.is_away:
            return torch.empty(shape, dtype=self.compute_dtype, device="meta")
        return self.dequantize(self.compute_dtype).as_subclass(DequantizedWeight)

    @property
    def is_away(self) -> bool:
        """Whether the codes are elsewhere for now: not loaded yet, or offloaded between products."""
        return self._choice is None and getattr(self, self._packed[0]).is_meta

    @property
    def is_offloaded(self) -> bool:
        """Whether accelerate brings the codes before each product and takes them away after it."""
        # Looked up like this because it is asked at every product, and nn.Module is slow to say no.
        hook: Any = self.__dict__.get("_hf_hook")
        if hook is None:
            return False
        hooks = getattr(hook, "hooks", (hook,))
        return any(getattr(each, "offload", False) and each.offload_buffers for each in hooks)

    @torch.no_grad()
    def prepare(self, dtype: torch.dtype | None = None, prefer: str | None = None) -> Choice:
        """Arrange the codes for the kernel that fits; returns it with the reason.

        Args:
            dtype: of the activations to come; that of the scales by default.
            prefer: insist on a kernel, from now on.

        Raises:
            KernelError: the preferred kernel cannot serve this layer.
        """
        self._prefer = prefer or self._prefer
        # Tensors born in inference mode could never be used in training.
        with torch.inference_mode(False):
            if self._merge is not None:
                return self._merge.prepare(dtype, self._prefer)
            weight = self.weight_canonical()
            dtype = dtype or weight.scales.dtype
            spec = LayerSpec(
                weight.codes.device.type,
                dtype,
                self.in_features,
                self.out_features,
                self.group_size,
                self.bits,
            )
            choice = choose(spec, self._prefer)
            self._arranged(choice, choice.kernel.prepare(weight, dtype), dtype)
        return choice

    def _arranged(self, choice: Choice, state: Any, dtype: torch.dtype) -> None:
        """Take up a kernel's arrangement, and give up the checkpoint's tensors."""
        self._choice, self._state, self.compute_dtype = choice, state, dtype
        for name in self._packed:
            # Not None: PEFT would ask a `qweight` that exists for its device.
            self._buffers.pop(name, None)

    def weight_canonical(self) -> QuantizedWeight:
        """The weight as codes, scales and zero points: exactly what was loaded."""
        if self._choice is None:
            tensors = {name: getattr(self, name) for name in self._packed}
            return get_format(self.layout).unpack(tensors, self.bits, self.group_size)
        codes = self._choice.kernel.codes(self._state)[self._rows]
        scales, zeros = self._state.scales[self._rows], self._state.zeros[self._rows]
        return QuantizedWeight(codes, scales, zeros, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats `[out_features, in_features]`."""
        return self.weight_canonical().dequantize(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs `[..., in_features]` to `[..., out_features]`, in the inputs' dtype."""
        if self.is_offloaded:
            # An arrangement that stayed would be the memory that offloading is to save.
            return F.linear(inputs, self.dequantize(inputs.dtype), self._bias_as(inputs.dtype))
        if self._choice is None:
            self.prepare(inputs.dtype)
        merge = self._merge  # preparing may have found that the layer can be merged no more
        out = self._product(inputs, self.out_features) if merge is None else merge.product(self, inputs)
        bias = self.bias
        return out if bias is None else out + bias.to(out.dtype)

    def _product(self, inputs: Tensor, out_features: int) -> Tensor:
        """With all rows of the state, of which there are more than the layer's own when it is merged."""
        assert self._choice is not None  # forward prepares
        if inputs.shape[-1] != self.in_features:
            raise KernelError(
                f"inputs of {inputs.shape[-1]} channels were given to a quantized layer of {self.in_features}"
            )
        return multiply(inputs, self._choice.kernel, self._state, out_features)

    def held_tensors(self) -> list[Tensor]:
        """What a product reads: the kernel's arrangement, or the checkpoint's tensors before there is one."""
        arranged = [part for part in self._state or () if isinstance(part, Tensor)]
        return arranged + list(self.buffers())

    def _bias_as(self, dtype: torch.dtype) -> Tensor | None:
        bias = self.bias  # asked for once: nn.Module looks for it in three places
        return None if bias is None else bias.to(dtype)

    def _release(self) -> None:
        """Go back to the checkpoint's tensors, which can be moved and saved."""
        if self._choice is None:
            return
        # What is multiplied together is given back together.
        for layer in self._merge.members if self._merge is not None else (self,):
            packed = get_format(layer.layout).pack(layer.weight_canonical())
            layer._choice = layer._state = None
            for name, tensor in packed.items():
                layer.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # A kernel's arrangement belongs to its device and dtype: moved layers arrange anew when next used.
        self._release()
        before = {name: getattr(self, name) for name in self._packed}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                # Casts are meant for activations. Rounded scales would change every weight.
                setattr(self, name, tensor.to(moved.device))
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        # An arrangement depends on the processor: in a pickle its bytes could come to mean other codes.
        # And a copy of one layer must not hold those that it is multiplied with.
        state = self.__dict__ | {"_merge": None, "_rows": slice(None)}
        if self._choice is not None:
            state |= {"_choice": None, "_state": None}
            state["_buffers"] = self._buffers | get_format(self.layout).pack(self.weight_canonical())
        return state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._choice is not None:
            for name, tensor in get_format(self.layout).pack(self.weight_canonical()).items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._release()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Measures and kernel."""
        kernel = self._choice.kernel.name if self._choice else "not prepared"
        if self._merge is not None:
            kernel += f", merged={len(self._merge.members)}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.bits}, group_size={self.group_size}, kernel={kernel}"
        )

"""Layers of experts in one call of C++ for a few tokens, for a model on a CPU: those that are proved such.

Which projection is what, and which activation lies between, is tried out: for random tokens of several sizes,
sent to all experts there are, the layer and ours must agree, in float32 and in the model's dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import KernelError
from awq.hf.fused.attention_proof import joined, kernel_of
from awq.hf.fused.parts import Parts
from awq.kernels.cpu_experts import CpuExperts, Expert
from awq.kernels.cpu_native import KINDS
from awq.kernels.cpu_product import ACTIVATIONS
from awq.nn import QuantExperts, QuantLinear

# Tokens beyond which products take so long that calling them one by one costs nothing.
_FEW = 64
# Sizes of random tokens; the largest reach whatever a model may clamp.
_SIZES = (1.0, 8.0, 64.0)
_CLOSE = 2e-3


class NativeExperts:
    """Stands in for the `forward` of one layer of experts."""

    def __init__(self, module: QuantExperts, experts: CpuExperts) -> None:
        self.module, self.experts = module, experts
        self._parts = [Parts([module.get_submodule(str(number))]) for number in range(module.count)]
        self._places = [(module._modules, name, child) for name, child in module.named_children()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module, which takes over where ours does not serve."""
        if len(args) == 3 and not kwargs and self._serves(*args):
            x, chosen, shares = args
            chosen = chosen.long().contiguous()
            hit = sorted(set(chosen.flatten().tolist()))
            if self._are_as_proved(hit):
                return self.experts(x, chosen, shares.contiguous(), hit)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _serves(self, x: Any, chosen: Any, shares: Any) -> bool:
        dtype, module = self.experts.dtype, self.module
        return (
            isinstance(x, Tensor)
            and x.shape == (len(x), self.experts.channels)
            and len(x) <= _FEW
            and x.dtype is dtype
            and x.is_cpu
            and x.is_contiguous()
            and isinstance(chosen, Tensor)
            and isinstance(shares, Tensor)
            and chosen.shape == shares.shape == (len(x), chosen.shape[-1])
            and shares.dtype in (torch.float32, dtype)
            and module.routing == "routed"
            and module.keep is None
            and not module.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    def _are_as_proved(self, hit: Sequence[int]) -> bool:
        """Whether the experts that are needed are there, with the tensors they had."""
        if any(siblings.get(name) is not child for siblings, name, child in self._places):
            return False
        count = len(self._parts)
        return all(0 <= number < count and self._parts[number].are_as_they_were() for number in hit)


def use_native_experts(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Replace the `forward` of each layer of experts that is proved to be one; returns their names."""
    found = []
    for name, module in model.named_modules():
        native = native_experts(module, dtype)
        if native is not None:
            module.forward = native
            found.append(name)
    return found


def undo_native_experts(model: nn.Module) -> None:
    """Undo `use_native_experts`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), NativeExperts):
            del module.forward


@torch.no_grad()
def native_experts(module: nn.Module, dtype: torch.dtype) -> NativeExperts | None:
    """What does for a layer of experts if it is proved that it can, or None."""
    if type(module) is not QuantExperts or module._held or dtype not in KINDS or "forward" in module.__dict__:
        return None
    names = [name for part in module.parts.values() for name in part.projections]
    experts = [module.layers(number, names) for number in range(module.count)]
    layers = [layer for expert in experts for layer in expert]
    if len(names) != 3 or not all(_is_at_hand(layer) for layer in layers):
        return None
    for layer in layers:
        if layer._choice is None:
            layer.prepare(dtype)
    kernel = kernel_of(layers)
    if kernel is None:
        return None
    for order, activation in itertools.product(_orders(module, names), ACTIVATIONS):
        try:
            made = {
                each: CpuExperts(_products(experts, order, each), activation, each, kernel.digits(each))
                for each in (torch.float32, dtype)
            }
            if all(_agrees(module, ours) for ours in made.values()):
                return NativeExperts(module, made[dtype])
        except (KernelError, RuntimeError, TypeError, ValueError):
            continue  # a module that takes something else
    return None


def _is_at_hand(layer: Any) -> bool:
    return (
        isinstance(layer, QuantLinear) and not layer.is_away and not layer.is_offloaded and not layer._merge
    )


def _orders(module: QuantExperts, names: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Where gate, up and down are among the projections, as far as they are known."""
    (down,) = (names.index(name) for name in module.parts["down_proj"].projections)
    first, second = (place for place in range(3) if place != down)
    yield first, second, down
    yield second, first, down


def _products(
    experts: Sequence[Sequence[QuantLinear]], order: Sequence[int], dtype: torch.dtype
) -> list[Expert]:
    return [Expert(*(joined((expert[place],), dtype) for place in order)) for expert in experts]


def _agrees(module: QuantExperts, ours: CpuExperts) -> bool:
    """Whether ours gives what the module gives, for tokens of which each expert gets two."""
    generator = torch.Generator().manual_seed(0)
    count, dtype = module.count, ours.dtype
    sizes = torch.tensor(_SIZES)[torch.arange(count) % len(_SIZES)].unsqueeze(1)
    x = (sizes * torch.randn(count, ours.channels, generator=generator)).to(dtype)
    numbers = torch.arange(count)
    chosen = torch.stack((numbers, (numbers + 1) % count), dim=1)
    shares = torch.rand(chosen.shape, generator=generator).to(dtype)
    expected = type(module).forward(module, x, chosen, shares)
    if not isinstance(expected, Tensor) or expected.shape != x.shape:
        return False
    close = max(_CLOSE, 0 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps)
    off = (ours(x, chosen, shares, numbers.tolist()) - expected).float().norm(dim=1)
    return bool((off <= close * expected.float().norm(dim=1)).all())

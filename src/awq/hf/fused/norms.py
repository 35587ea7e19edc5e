"""Root mean square norms in one call instead of six, for a model on a CPU.

What is such a norm is found by proof, not by name: a module with one vector for a parameter whose output, for
random weights and inputs of several sizes, is x / sqrt(mean(x²) + eps) times the weight, or times the weight
and one. eps is one of the module's own numbers. Where the quotient is rounded is found in the model's dtype.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awq.kernels.cpu_decoding import WIDE, rms_norm
from awq.kernels.cpu_native import KINDS

# Of inputs: mean squares far below, near and above any eps.
_SIZES = (1e-4, 1e-3, 1e-2, 1.0, 1e2)
_CLOSE = 1e-5


class Rule(NamedTuple):
    """What a norm computes, and the dtype for which that was found."""

    epsilon: float
    offset: float
    rounds: bool
    dtype: torch.dtype


class NativeNorm:
    """Stands in for the `forward` of one norm."""

    def __init__(self, module: nn.Module, rule: Rule) -> None:
        self.module, self.rule = module, rule

    def __call__(self, x: Tensor) -> Tensor:
        """As the module, which takes over where gradients are wanted, or another dtype."""
        weight, rule = self.module._parameters["weight"], self.rule
        assert weight is not None
        if (
            x.dtype is not rule.dtype
            or not x.is_cpu
            or not weight.is_cpu
            or torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        ):
            out: Tensor = type(self.module).forward(self.module, x)
            return out
        return rms_norm(x, weight, rule.epsilon, rule.offset, rule.rounds)


def use_native_norms(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Replace the `forward` of each norm that is proved to be one; returns their names."""
    found = []
    for name, module in model.named_modules():
        rule = rule_of(module, dtype)
        if rule is not None:
            module.forward = NativeNorm(module, rule)
            found.append(name)
    return found


def undo_native_norms(model: nn.Module) -> None:
    """Undo `use_native_norms`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), NativeNorm):
            del module.forward


@torch.no_grad()
def rule_of(module: nn.Module, dtype: torch.dtype) -> Rule | None:
    """What a module computes if it is a root mean square norm that can be replaced, or None."""
    weight = module._parameters.get("weight")
    if (
        weight is None
        or len(list(module.parameters())) > 1
        or any(True for _ in module.buffers())
        or any(True for _ in module.children())
        or "forward" in module.__dict__
        or weight.dim() != 1
        or weight.numel() % WIDE
        or weight.device.type != "cpu"
        or not {weight.dtype, dtype} <= KINDS.keys()
    ):
        return None
    numbers = {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.1}
    try:
        for epsilon in numbers:
            for offset in (0.0, 1.0):
                if _computes(module, epsilon, offset):
                    return _rounding(module, Rule(epsilon, offset, False, dtype))
    except (RuntimeError, TypeError, ValueError):  # a module that takes something else
        pass
    return None


def _with_random_weight(module: nn.Module) -> tuple[nn.Module, Tensor]:
    """A copy of a module, and its weight: with ones or zeros, rules could not be told apart."""
    probe = copy.deepcopy(module)
    weight: Any = probe.weight
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    return probe, weight


def _computes(module: nn.Module, epsilon: float, offset: float) -> bool:
    """Whether a copy in float32 with random weights is a norm with this eps and this offset of the weight."""
    probe, weight = _with_random_weight(module)
    probe, weight = probe.float(), weight.float()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(_SIZES), weight.numel(), generator=generator) * torch.tensor(_SIZES).unsqueeze(1)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * (weight + offset)
    off = (probe(x) - expected).abs().amax(-1)
    return bool((off <= _CLOSE * expected.abs().amax(-1)).all())


def _rounding(module: nn.Module, rule: Rule) -> Rule | None:
    """The rule with the place of its rounding, if results are at most one rounding away from the module's."""
    probe, weight = _with_random_weight(module)
    x = torch.randn(8, weight.numel(), generator=torch.Generator().manual_seed(1)).to(rule.dtype)
    expected = probe(x)
    if expected.dtype != rule.dtype:
        return None
    # Sums of float32 have no order of their own.
    close = max(1.01 * torch.finfo(rule.dtype).eps, 1e-6)
    best: tuple[int, Rule] | None = None
    for rounds in (True, False):
        off = rms_norm(x, weight, rule.epsilon, rule.offset, rounds).float() - expected.float()
        if bool((off.abs() <= close * expected.float().abs()).all()):
            different = int((off != 0).sum())
            if best is None or different < best[0]:
                best = different, rule._replace(rounds=rounds)
    return None if best is None else best[1]

"""Adapters on quantized experts.

PEFT sees an architecture whose experts transformers fuses, and turns targets such as `w1` into the fused
parameter's name: on quantized experts, which are layers of their own, nothing would be found, and the experts
would silently get no adapters. For models that hold `QuantExperts` its two translations are left out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any


def extend(module: ModuleType) -> dict[str, Any]:
    """Wrap the translations of `peft.utils.transformers_weight_conversion`, where this version has them.

    Returns what `restore` takes.
    """
    stock = {}
    for name, returned in (
        ("convert_peft_config_for_transformers", None),
        ("convert_peft_adapter_state_dict_for_transformers", "adapter_state_dict"),
    ):
        original = getattr(module, name, None)
        if original is not None:
            stock[name] = original
            setattr(module, name, _unless_quantized(original, returned))
    return stock


def restore(module: ModuleType, stock: dict[str, Any]) -> None:
    """Undo `extend`."""
    for name, original in stock.items():
        setattr(module, name, original)


def _unless_quantized(original: Callable[..., Any], returned: str | None) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        from awq.nn import QuantExperts

        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if any(isinstance(each, QuantExperts) for each in given["model"].modules()):
            return given[returned] if returned else None
        return original(*args, **kwargs)

    return call

"""OpenAWQ inside transformers: a quantizer that loads AWQ checkpoints with no other package installed.

transformers itself is imported when something here needs it, not before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from awq.hf.registration import register, unregister

if TYPE_CHECKING:
    from awq.hf.load import is_awq, load_quantized
    from awq.hf.plain import load_float

__all__ = ["is_awq", "load_float", "load_quantized", "register", "unregister"]

_LAZY = {"is_awq": "awq.hf.load", "load_float": "awq.hf.plain", "load_quantized": "awq.hf.load"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'awq.hf' has no attribute {name!r}")

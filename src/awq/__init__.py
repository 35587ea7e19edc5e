"""OpenAWQ: activation-aware 4-bit quantization of Hugging Face language models, and the runtime for it.

    import awq
    awq.quantize("model-folder", "out", awq.QuantConfig(group_size=128))

    from awq import AutoAWQForCausalLM
    model = AutoAWQForCausalLM.from_quantized("out")

Heavy parts are imported when they are first used, so `import awq` alone is quick. It also lets transformers
load AWQ checkpoints through OpenAWQ, as soon as that is imported; `awq.hf.unregister()` undoes it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from awq.config import QuantConfig
from awq.errors import AwqError
from awq.hf.registration import register as _register
from awq.legacy import install as _install_old_paths

if TYPE_CHECKING:
    from awq.auto import AutoAWQForCausalLM
    from awq.hf import load_quantized
    from awq.pipeline import quantize
    from awq.pipeline.convert import convert
    from awq.pipeline.export import export

__version__ = "0.1.0"
__all__ = [
    "AutoAWQForCausalLM",
    "AwqError",
    "QuantConfig",
    "__version__",
    "convert",
    "export",
    "load_quantized",
    "quantize",
]

_install_old_paths()
_register()
_LAZY = {
    "AutoAWQForCausalLM": "awq.auto",
    "convert": "awq.pipeline.convert",
    "export": "awq.pipeline.export",
    "load_quantized": "awq.hf",
    "quantize": "awq.pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'awq' has no attribute {name!r}")

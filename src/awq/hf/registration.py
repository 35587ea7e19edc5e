"""Put OpenAWQ into transformers, whichever of the two is imported first.

transformers has no entry points for quantizers and refuses to register a taken name, so the class is put
into its table directly, and its `AwqConfig` learns to take what AutoAWQ's users write. Importing transformers
takes seconds, so `import awq` does not: if transformers (or PEFT) is not there yet, the few modules concerned
are taken care of the moment they are imported, by a finder on `sys.meta_path` that finds nothing by itself.
"""

from __future__ import annotations

import functools
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIG = "transformers.utils.quantization_config"
_TABLE = "transformers.quantizers.auto"
_PEFT = "peft.utils.transformers_weight_conversion"
# Ours imports transformers. Whoever imports it first has the table made before the class that goes into it,
# so the table is seen to when our module is complete.
_OURS = "awq.hf.quantizer"

# What was replaced, by the module it is in.
_stock: dict[str, Any] = {}


def register() -> None:
    """Let transformers load AWQ checkpoints through OpenAWQ from now on; done by `import awq`."""
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
    _extend_imported()


def _extend_imported() -> None:
    for name in _ACTIONS:
        module = sys.modules.get(name)
        if module is not None and not _is_incomplete(module):
            _extend(name, module)


def unregister() -> None:
    """Give transformers and PEFT their own classes and functions back."""
    if _watcher in sys.meta_path:
        sys.meta_path.remove(_watcher)
    for name in list(_stock):
        _ACTIONS[name][1](sys.modules[name], _stock.pop(name))


def _extend(name: str, module: ModuleType) -> None:
    ours = sys.modules.get(_OURS)
    if name in _stock or (ours is not None and not hasattr(ours, "AwqQuantizer")):
        return  # done before, or called from within our own module
    _stock[name] = _ACTIONS[name][0](module)


def _is_incomplete(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)


def _extend_config(module: ModuleType) -> Any:
    from awq.hf.awq_config import extend

    return extend(module.AwqConfig)


def _restore_config(module: ModuleType, stock: Any) -> None:
    from awq.hf.awq_config import restore

    restore(module.AwqConfig, stock)


def _extend_table(module: ModuleType) -> Any:
    from awq.hf.quantizer import AwqQuantizer

    stock = module.AUTO_QUANTIZER_MAPPING["awq"]
    module.AUTO_QUANTIZER_MAPPING["awq"] = AwqQuantizer
    return stock


def _restore_table(module: ModuleType, stock: Any) -> None:
    module.AUTO_QUANTIZER_MAPPING["awq"] = stock


def _extend_peft(module: ModuleType) -> Any:
    from awq.hf.peft import extend

    return extend(module)


def _restore_peft(module: ModuleType, stock: Any) -> None:
    from awq.hf.peft import restore

    restore(module, stock)


_ACTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    _CONFIG: (_extend_config, _restore_config),
    _TABLE: (_extend_table, _restore_table),
    _PEFT: (_extend_peft, _restore_peft),
}


class _Watcher(importlib.abc.MetaPathFinder):
    """Lets the other finders find a few modules, and acts when these have been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a watched module, whose loader calls us back; None for any other."""
        if name not in _ACTIONS and name != _OURS:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                loader: Any = spec.loader
                loader.exec_module = functools.partial(_execute, loader.exec_module)
                return spec
        return None


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    execute(module)
    if _watcher not in sys.meta_path:
        return
    if module.__name__ == _OURS:
        _extend_imported()
    else:
        _extend(module.__name__, module)


_watcher = _Watcher()

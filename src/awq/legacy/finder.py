"""The finder that makes AutoAWQ's modules when they are imported.

`awq.quantize` is the one clash: a function here, a package there. Python's import system takes whatever lies
in `sys.modules` for a module, if it has `__name__`, `__path__` and `__spec__`, so the function itself is put
there. `awq.quantize(…)` and `from awq.quantize.quantizer import AwqQuantizer` both work, in any order, and
`help(awq.quantize)` shows the function in either case.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from awq.errors import RemovedError
from awq.legacy.table import MODULES, reason, target

_CLASH = "awq.quantize"


class _OldModule(ModuleType):
    """A module of AutoAWQ's, of which only the names are left."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = target(name)
        if found is not None:
            module, _, attribute = found.partition(":")
            value = getattr(importlib.import_module(module), attribute)
            setattr(self, name, value)
            return value
        raise RemovedError(f"{self.__name__}.{name} of AutoAWQ is not here: {reason(self.__name__, name)}")


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldModule(spec.name, f"AutoAWQ's `{spec.name}`; see `awq.legacy`.")

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == _CLASH:
            from awq.pipeline import quantize

            function: Any = quantize
            # `from awq.quantize import scale` makes the module's name from the package's `__name__`.
            function.__name__, function.__path__, function.__spec__ = _CLASH, [], module.__spec__
            sys.modules[_CLASH] = function


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        is_package = any(module.startswith(f"{fullname}.") for module in MODULES)
        return ModuleSpec(fullname, _Loader(), is_package=is_package)


def install() -> None:
    """Let Python find AutoAWQ's modules. May be called again."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

"""AutoAWQ's public names and signatures, read from its source package without importing it.

    pip download autoawq==0.2.9 --no-deps --no-binary :all: --no-build-isolation
    python tests/tools/autoawq_signatures.py autoawq-0.2.9.tar.gz tests/data/autoawq_0.2.9_signatures.json

The result maps each module to what can be imported from it. A function is a list of arguments, a class a
table of its public methods and annotated fields, anything else the string "value"; a name that a module
imports from another module of AutoAWQ is the string "= module.name". An argument is `[name, default]`, with
the default's source text; `[name]` has none, and `*name` and `**name` are as in Python. Annotations are left
out.
"""

from __future__ import annotations

import ast
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sources(package: Path) -> dict[str, str]:
    """Module name to source text, from a .tar.gz or a .whl."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
    else:
        with tarfile.open(package) as archive:
            members = [member for member in archive if member.isfile()]
            files = {m.name.partition("/")[2]: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    out = {}
    for name, content in files.items():
        if name.startswith("awq/") and name.endswith(".py"):
            module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            out[module] = content.decode("utf-8")
    return out


def arguments(function: ast.FunctionDef) -> list[list[str]]:
    """Every argument but `self` and `cls` (AutoAWQ's class methods call theirs `self` too)."""
    spec = function.args
    plain = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(plain) - len(spec.defaults)) + list(spec.defaults)
    out = [_argument(arg.arg, default) for arg, default in zip(plain, defaults, strict=True)]
    if out and out[0][0] in ("self", "cls"):
        out = out[1:]
    if spec.vararg:
        out.append([f"*{spec.vararg.arg}"])
    out += [
        _argument(arg.arg, default) for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    ]
    if spec.kwarg:
        out.append([f"**{spec.kwarg.arg}"])
    return out


def _argument(name: str, default: ast.expr | None) -> list[str]:
    return [name] if default is None else [name, ast.unparse(default)]


def public_names(source: str, module: str, is_package: bool) -> dict[str, Any]:
    """What can be imported from a module."""
    out: dict[str, Any] = {}
    for node in _statements(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef):
            out[node.name] = arguments(node)
        elif isinstance(node, ast.ClassDef):
            out[node.name] = _members(node)
        elif isinstance(node, ast.Assign):
            out |= {target.id: "value" for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parent = module if is_package else module.rpartition(".")[0]
                origin = f"{parent}.{origin}".rstrip(".")
            if origin.split(".")[0] == "awq":
                for alias in node.names:
                    out.setdefault(alias.asname or alias.name, f"= {origin}.{alias.name}")
    return {name: value for name, value in out.items() if not name.startswith("_") and name != "*"}


def _members(node: ast.ClassDef) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and (item.name == "__init__" or not item.name.startswith("_")):
            out[item.name] = arguments(item)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            out[item.target.id] = "value"
    return out


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those inside its `try` and `if` included."""
    for node in body:
        yield node
        if isinstance(node, (ast.Try, ast.If)):
            yield from _statements(node.body)


def extract(package: Path) -> dict[str, dict[str, Any]]:
    """The whole table, modules in alphabetical order."""
    found = sources(package)
    packages = {name.rpartition(".")[0] for name in found}
    return {
        module: public_names(found[module], module, module in packages or not found[module].strip())
        for module in sorted(found)
    }


def dump(table: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each module."""
    lines = [f"{json.dumps(module)}: {json.dumps(names)}" for module, names in table.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(dump(extract(Path(sys.argv[1]))), "utf-8")

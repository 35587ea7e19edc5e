"""The tree of errors is the one its docstring draws."""

from __future__ import annotations

import inspect
import re

import pytest

from awq import errors

TREE = inspect.getdoc(errors) or ""
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and value.__module__ == errors.__name__
}


def drawn() -> dict[str, tuple[str, str | None]]:
    """`{class: (parent in the drawing, built-in class in brackets)}`."""
    out: dict[str, tuple[str, str | None]] = {}
    above: dict[int, str] = {}
    for line in TREE.splitlines():
        found = re.match(r"^([ │├└─]*)(\w+(?:Error))(?: \((\w+)\))?(?:  +\S.*)?$", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        out[found[2]] = (above.get(depth - 1, ""), found[3])
        above[depth] = found[2]
    return out


def test_every_error_is_drawn_and_nothing_else() -> None:
    assert set(drawn()) == set(CLASSES)
    assert {"AwqError", "DiskFullError"} <= set(CLASSES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_each_error_hangs_where_it_is_drawn(name: str) -> None:
    parent, builtin = drawn()[name]
    bases = [base.__name__ for base in CLASSES[name].__bases__]
    assert bases == [base for base in (parent or "Exception", builtin) if base]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_each_error_keeps_its_message_and_is_caught_by_the_root(name: str) -> None:
    with pytest.raises(errors.AwqError, match=r"^what, where, and the cure$"):
        raise CLASSES[name]("what, where, and the cure")

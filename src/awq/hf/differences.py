"""How a checkpoint and its model differ, in words."""

from __future__ import annotations

from collections.abc import Collection

_SHOWN = 10


def told(title: str, names: Collection[str]) -> str:
    """`3 missing: a, b, c`, names in order and cut after ten; nothing for no names."""
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {title}: {', '.join(sorted(names)[:_SHOWN])}{more}"

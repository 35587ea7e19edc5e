"""How to spend a budget of bytes: which choice for each unit, where every choice has a size and an error.

Errors of different units are taken to add up. The way is greedy: from the smallest choices on, always
the change that lessens the error most for each byte it costs, as long as one fits. Where each unit's choices
lie on a convex curve, as bits and their errors nearly do, no other spending of the same bytes is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """What a choice costs, in bytes, and the error that it leaves."""

    bytes: int
    error: float


def spend(units: Sequence[Sequence[Choice]], budget: float) -> list[int] | None:
    """The choice for each unit, by index, or None when not even the smallest ones fit.

    Args:
        units: the choices of each unit; at least one for each.
        budget: bytes for all units together.
    """
    chosen = [min(range(len(unit)), key=lambda i, unit=unit: (unit[i], i)) for unit in units]  # type: ignore[misc]
    left = budget - sum(unit[i].bytes for unit, i in zip(units, chosen, strict=True))
    if left < 0:
        return None
    while True:
        best: tuple[float, int, int] | None = None
        for number, unit in enumerate(units):
            now = unit[chosen[number]]
            for index, choice in enumerate(unit):
                cost, gain = choice.bytes - now.bytes, now.error - choice.error
                if gain <= 0 or cost > left:
                    continue
                # What costs nothing comes first of all.
                rate = gain / cost if cost > 0 else float("inf")
                if best is None or rate > best[0]:
                    best = rate, number, index
        if best is None:
            return chosen
        _, number, index = best
        left -= units[number][index].bytes - units[number][chosen[number]].bytes
        chosen[number] = index

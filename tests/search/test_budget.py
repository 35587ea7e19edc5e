"""A budget of bytes is kept, and spent where it lessens the error most."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from awq.search.budget import Choice, spend

UNITS = st.lists(
    st.lists(st.builds(Choice, st.integers(1, 9), st.floats(0, 4)), min_size=1, max_size=3),
    min_size=1,
    max_size=3,
)


def totals(units: list[list[Choice]], chosen: tuple[int, ...] | list[int]) -> Choice:
    picked = [unit[index] for unit, index in zip(units, chosen, strict=True)]
    return Choice(sum(choice.bytes for choice in picked), sum(choice.error for choice in picked))


@given(units=UNITS, budget=st.integers(0, 27))
def test_the_budget_is_kept_and_is_never_worse_spent_than_on_the_smallest_choices(
    units: list[list[Choice]], budget: int
) -> None:
    chosen = spend(units, budget)
    smallest = [min(range(len(unit)), key=lambda i, unit=unit: unit[i]) for unit in units]  # type: ignore[misc]
    if chosen is None:
        assert totals(units, smallest).bytes > budget
        return
    spent = totals(units, chosen)
    assert spent.bytes <= budget
    assert spent.error <= totals(units, smallest).error
    # Nothing that still fits would lessen the error.
    for number, unit in enumerate(units):
        for choice in unit:
            fits = spent.bytes - unit[chosen[number]].bytes + choice.bytes <= budget
            assert not (fits and choice.error < unit[chosen[number]].error)


def test_on_convex_curves_no_other_spending_of_the_same_bytes_is_better() -> None:
    units = [[Choice(size, weight * 0.25**size) for size in range(2, 7)] for weight in (1, 7, 30, 30)]
    for budget in range(8, 25):
        chosen = spend(units, budget)
        assert chosen is not None
        spent = totals(units, chosen)
        every = (totals(units, way) for way in itertools.product(range(5), repeat=4))
        best = min(way.error for way in every if way.bytes <= spent.bytes)
        assert spent.error <= best * (1 + 1e-12)


def test_what_costs_nothing_is_taken_first() -> None:
    assert spend([[Choice(4, 1.0), Choice(4, 0.5)], [Choice(1, 9.0), Choice(2, 0.0)]], 6) == [1, 1]
    assert spend([[Choice(4, 1.0)]], 3) is None

"""Every architecture of the zoo, from discovery to a loaded checkpoint: the documented table is true."""

from __future__ import annotations

import pytest

from zoo.coverage import INVARIANT, SAME, STREAMED
from zoo.table import FLOATS, SECTIONS, cells, committed, row_of, stable

# How far a ratio of divergences may lie from the documented one: near ties are decided by the last bit.
_NEAR = 0.25


@pytest.fixture(scope="module")
def documented() -> dict[str, dict[str, str]]:
    return committed()


@pytest.mark.parametrize("name", [name for names in SECTIONS.values() for name in names])
def test_an_architecture_does_what_its_row_says(name: str, documented: dict[str, dict[str, str]]) -> None:
    row = row_of(name)
    assert row.streamed <= STREAMED
    assert row.change <= INVARIANT
    assert row.differs <= SAME
    assert stable(cells(name, row)) == stable(documented[name])
    if not row.refused:
        change, ratio, differs = (float(documented[name][column]) for column in FLOATS)
        assert change <= INVARIANT
        assert differs <= SAME
        assert abs(row.ratio - ratio) <= _NEAR


def test_the_page_tells_of_every_architecture_and_no_other(documented: dict[str, dict[str, str]]) -> None:
    assert list(documented) == [name for names in SECTIONS.values() for name in names]

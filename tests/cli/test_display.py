"""What is shown while a run goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from awq.cli.quantize import Display
from awq.pipeline import BlockReport, Plan

PLAN = Plan(
    "model", "Llama", "some text", 5, [], [], {}, 10, 20, 30, "cpu", 4096, resumed_at=1
)  # fmt: skip
REPORT = BlockReport("block", {"search": 100.0}, {"chosen": "gptq", "error": 0.5, "errors": {"rtn": 1.0}})


class Terminal:
    """A terminal on a clock of its own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.file = io.StringIO()
        self.console = Console(
            file=self.file,
            force_terminal=True,
            width=150,
            get_time=lambda: self.now,
            markup=False,
            highlight=False,
        )

    def shown(self) -> str:
        text = self.file.getvalue()
        self.file.seek(0)
        self.file.truncate()
        return text


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


def test_the_time_left_is_known_from_the_first_block_on_however_long_it_takes(terminal: Terminal) -> None:
    with Display(terminal.console) as display:
        display.planned(PLAN)
        assert "1/5" in terminal.shown()
        terminal.now += 100
        display.block_done(1, REPORT)
    shown = terminal.shown()
    assert "2/5" in shown
    assert "0:05:00" in shown  # three more, a hundred seconds each


def test_the_time_left_runs_down_between_blocks_and_never_below_zero(terminal: Terminal) -> None:
    for waited, left in ((40, "0:04:20"), (1000, "0:00:00")):
        with Display(terminal.console) as display:
            display.planned(PLAN)
            terminal.now += 100
            display.block_done(1, REPORT)
            terminal.now += waited
        assert left in terminal.shown()


def test_blocks_and_notes_are_lines_that_stay(terminal: Terminal) -> None:
    with Display(terminal.console) as display:
        display.planned(PLAN)
        display.block_done(1, REPORT)
        display.note("something [worth] knowing")
    shown = terminal.shown()
    assert "block: gptq, 50% of plain rounding's error, 100.0 s" in shown
    assert "note: something [worth] knowing" in shown
    assert "1 of 5 blocks were done before" in shown


def test_a_run_that_ends_before_its_plan_is_no_crash(terminal: Terminal) -> None:
    with pytest.raises(ValueError, match="early"), Display(terminal.console):
        raise ValueError("early")

"""Tuning a block by its own output, on inputs that the quantized blocks before give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.config import QuantConfig
from awq.model.blocks import BlockCall
from awq.pipeline import quantize
from awq.pipeline.block import make_judge
from awq.pipeline.observe import Batch
from awq.pipeline.stacks import holding
from awq.pipeline.tune import teaching, tune
from awq.search import Codes, full_range, nearest

CPU = torch.device("cpu")


class Block(nn.Module):
    """Two layers with a bend between them, and a scale of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.narrow(torch.tanh(self.wide(x)))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().requires_grad_(False)


def rounded(block: nn.Module, bits: int) -> dict[str, Codes]:
    return {
        name: nearest(layer.weight.data, *full_range(layer.weight.data, 16), bits, torch.float16)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }


def batches(block: nn.Module, masked: bool = False) -> tuple[list[Batch], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[:, 12:] = False
    call = BlockCall((), {"scale": 2.0})
    made = [
        Batch(
            torch.randn(4, 16, 32, generator=generator),
            call,
            mask if masked else None,
        )
        for _ in range(6)
    ]
    return made, [batch.run(block, CPU) for batch in made]


def error(block: nn.Module, codes: dict[str, Codes], given: list[Batch], targets: list[Tensor]) -> float:
    with holding(block, codes):
        parts = [b.run(block, CPU) - t for b, t in zip(given, targets, strict=True)]
    return sum(
        float((part if b.mask is None else part[b.mask]).square().sum())
        for part, b in zip(parts, given, strict=True)
    )


def tuned(
    block: nn.Module,
    start: dict[str, Codes],
    given: list[Batch],
    targets: list[Tensor],
    steps: int,
    bits: int,
) -> dict[str, Codes]:
    """Taught by all but the first batch, which judges."""
    judge = make_judge(block, given[:1], targets[:1], CPU)
    return tune(block, start, given[1:], targets[1:], steps, dict.fromkeys(start, bits), CPU, judge)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_comes_nearer_to_the_originals(block: Block, bits: int) -> None:
    given, targets = batches(block)
    start = rounded(block, bits)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    better = tuned(block, start, given, targets, 120, bits)
    assert error(block, better, given, targets) < 0.7 * error(block, start, given, targets)
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())
    for name, layer in better.items():
        assert int(layer.codes.max()) < 2**bits
        assert layer.scales.dtype == torch.float16 and bool((layer.scales > 0).all())
        assert torch.equal(layer.zeros, start[name].zeros)


def test_the_same_call_gives_the_same_codes(block: Block) -> None:
    given, targets = batches(block)
    start = rounded(block, 4)
    once, again = (tuned(block, start, given, targets, 20, 4) for _ in range(2))
    assert all(torch.equal(a, b) for name in start for a, b in zip(once[name], again[name], strict=True))


def test_errors_that_come_with_the_inputs_are_put_right(block: Block) -> None:
    given, targets = batches(block)
    drift = 0.05 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    drifted = [Batch(batch.hidden + drift, batch.call, None) for batch in given]
    start = rounded(block, 4)
    better = tuned(block, start, drifted, targets, 120, 4)
    assert error(block, better, drifted, targets) < 0.95 * error(block, start, drifted, targets)


def test_padding_teaches_nothing(block: Block) -> None:
    given, targets = batches(block, masked=True)
    start = rounded(block, 3)
    clean = tuned(block, start, given, targets, 20, 3)
    for batch, target in zip(given, targets, strict=True):
        batch.hidden[:, 12:] = 1e3
        target[:, 12:] = -1e3
    dirty = tuned(block, start, given, targets, 20, 3)
    assert all(torch.equal(clean[name].codes, dirty[name].codes) for name in start)


def test_batches_that_did_not_teach_never_come_off_worse(block: Block) -> None:
    given, targets = batches(block)
    start = rounded(block, 4)
    misled = [2 * batch.hidden - target for batch, target in zip(given, targets, strict=True)]
    judge = make_judge(block, given[:1], targets[:1], CPU)
    kept = tune(block, start, given[1:], misled[1:], 120, dict.fromkeys(start, 4), CPU, judge)
    assert error(block, kept, given[:1], targets[:1]) <= error(block, start, given[:1], targets[:1])


@pytest.mark.parametrize("count", [1, 2, 8, 9, 40])
def test_batches_teach_or_judge_and_never_both(count: int) -> None:
    taught, held = teaching(range(count))
    assert held and taught
    assert sorted({*taught, *held}) == list(range(count))
    assert count == 1 or not {*taught} & {*held}


class InterruptedRunError(Exception):
    pass


class Stops:
    """Ends a run behind a block, as a kill would."""

    def __init__(self, behind: int) -> None:
        self.behind = behind

    def planned(self, plan: Any) -> None: ...

    def note(self, message: str) -> None: ...

    def block_done(self, number: int, report: Any) -> None:
        if number == self.behind:
            raise InterruptedRunError


def test_a_tuned_run_that_was_stopped_goes_on_to_the_same_bytes(
    tiny: Any, token_lists: Any, tmp_path: Path
) -> None:
    tiny("llama", num_hidden_layers=4).save_pretrained(tmp_path / "model")
    config = QuantConfig.preset("best", group_size=32, tune=6)

    def run(out: str, progress: Any = None) -> Any:
        return quantize(
            tmp_path / "model", tmp_path / out, config, token_lists, device="cpu", progress=progress
        )

    report = run("whole")
    assert all("tuned" in block.outcome["errors"] for block in report.blocks)
    assert all(block.outcome["error"] <= block.outcome["errors"]["rtn"] for block in report.blocks)
    with pytest.raises(InterruptedRunError):
        run("broken", Stops(1))
    run("broken")
    for name in ("model.safetensors", "awq_report.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()

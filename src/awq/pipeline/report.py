"""What a run tells about itself, as data: the plan before the work, the report after it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Protocol

from awq.pipeline.writer import write_json as write_json


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is going to happen, known before any work is done.

    Args:
        model: the folder read.
        architecture: the model class.
        calibration: one sentence about the text.
        blocks: number of decoder blocks.
        kinds: for each kind of block, its description (see `KindPlan.describe`).
        quantized: full names of the layers to quantize.
        skipped: full names of the linear layers left float, with the reason.
        output_bytes: size of the result on disk.
        disk_bytes: space needed while working.
        peak_bytes: predicted peak memory of the device (of the process, on the CPU).
        device: where the work is done, and why there.
        batch_tokens: tokens of a batch, and so of the activations held at once.
        resumed_at: blocks done by an earlier, interrupted run.
        mix: under a budget, the `bits` of a weight on average and for each of the `layers` what it is
            quantized to, `[bits, group_size]`.
    """

    model: str
    architecture: str
    calibration: str
    blocks: int
    kinds: list[dict[str, Any]]
    quantized: list[str]
    skipped: dict[str, str]
    output_bytes: int
    disk_bytes: int
    peak_bytes: int
    device: str
    batch_tokens: int
    resumed_at: int = 0
    mix: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """A block that is done: its name, seconds of each stage, and what `awq.pipeline.block` says of it."""

    name: str
    seconds: dict[str, float]
    outcome: dict[str, Any]

    @property
    def total_seconds(self) -> float:
        """Wall time of the block."""
        return sum(self.seconds.values())

    def line(self) -> str:
        """One line for a person."""
        errors = self.outcome["errors"]
        chosen, rtn = self.outcome["chosen"], errors["rtn"]
        share = self.outcome["error"] / rtn if rtn else 1.0
        return f"{self.name}: {chosen}, {share:.0%} of plain rounding's error, {self.total_seconds:.1f} s"


Grade = Literal["excellent", "good", "poor", "broken", "unknown"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the saved checkpoint is like.

    Args:
        grade: `excellent`, `good`, `poor` (the sentence names the layers to look at), `broken` (NaN or
            infinity), or `unknown` (the sentence says why nothing could be compared).
        sentence: for a person.
        text: which text was used.
        kl, top1, rise: see `awq.evaluate.Divergence`, with their standard errors.
        perplexity, original_perplexity: of the checkpoint and of the original, and standard errors.
        tokens: tokens scored.
        blocks: see `awq.pipeline.verify.Measured`.
    """

    grade: Grade
    sentence: str
    text: str = ""
    kl: float | None = None
    kl_stderr: float | None = None
    top1: float | None = None
    top1_stderr: float | None = None
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    original_perplexity: float | None = None
    original_perplexity_stderr: float | None = None
    rise: float | None = None
    rise_stderr: float | None = None
    tokens: int = 0
    blocks: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Report:
    """A finished run.

    `seconds` has `total`, `prepare` (opening, calibration text, preflight), `mix` (measuring what a budget is
    best spent on, where there is one), `forward` (statistics), `search` (scales, ranges, codes, and judging
    them), `write`, and `verify` (comparing what is saved with the original). `verdict` is None where that was
    not asked for.
    """

    plan: Plan
    config: dict[str, Any]
    blocks: list[BlockReport]
    seconds: dict[str, float]
    peak_bytes: int
    verdict: Verdict | None = None

    def to_dict(self, timings: bool = True) -> dict[str, Any]:
        """As JSON values. Without timings the same run always gives the same report."""
        plan = dataclasses.asdict(self.plan)
        blocks = [{"name": block.name, **block.outcome} for block in self.blocks]
        out: dict[str, Any] = {"config": self.config, "plan": plan, "blocks": blocks}
        out["verdict"] = None if self.verdict is None else dataclasses.asdict(self.verdict)
        if timings:
            out["seconds"] = self.seconds
            out["peak_bytes"] = self.peak_bytes
            for entry, block in zip(blocks, self.blocks, strict=True):
                entry["seconds"] = block.seconds
        else:
            for key in ("model", "resumed_at", "peak_bytes"):
                del plan[key]
        return dict(finite(out))


def finite(value: Any) -> Any:
    """`value` with None in the place of NaN and infinity, for which JSON has no words."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


class Progress(Protocol):
    """Someone who wants to be told while a run goes on."""

    def planned(self, plan: Plan) -> None:
        """The preflight is done; nothing has been written yet."""

    def block_done(self, number: int, report: BlockReport) -> None:
        """Block `number` (from 0) is on disk."""

    def note(self, message: str) -> None:
        """Something worth knowing: a smaller batch, a dropped fold."""


class Silent:
    """Tells nobody."""

    def planned(self, plan: Plan) -> None:
        """Ignored."""

    def block_done(self, number: int, report: BlockReport) -> None:
        """Ignored."""

    def note(self, message: str) -> None:
        """Ignored."""

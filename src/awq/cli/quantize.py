"""`awq quantize`: a model folder in, a 4-bit checkpoint out."""

from __future__ import annotations

import datetime
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from awq.cli.common import check_target, console, quiet_libraries, write_json

if TYPE_CHECKING:
    from awq.pipeline import BlockReport, Plan, Report

# How a verdict looks.
_STYLES = {"excellent": "bold green", "good": "green", "poor": "bold yellow", "unknown": "yellow"}


def command(
    model: Annotated[str, typer.Argument(help="Folder with safetensors weights, or a hub name.")],
    out: Annotated[str, typer.Argument(help="Folder to make.")],
    bits: Annotated[int, typer.Option(help="Width of a code.")] = 4,
    group_size: Annotated[int, typer.Option(help="Input channels that share a scale; -1 for all.")] = 128,
    format: Annotated[
        str,
        typer.Option(
            help="gemm (AutoAWQ's layout, 4 bits), compressed-tensors (2, 4, 8), mlx (2 to 6, 8), gptq or "
            "gptq_v2 (2, 3, 4, 8), float or folded (plain weights)."
        ),
    ] = "gemm",
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Every zero point is the middle code.")
    ] = False,
    target_bits: Annotated[
        float | None,
        typer.Option(
            help="Choose width and group size for each layer, or leave it float, so that a weight takes so "
            "many bits on average; in gemm and gptq only what stays float is chosen."
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="fast, balanced, or best (slow).")] = "balanced",
    method: Annotated[str, typer.Option(help="awq, or rtn for plain rounding.")] = "awq",
    rounding: Annotated[
        str | None, typer.Option(help="auto (the better one per block), nearest or gptq; from the preset.")
    ] = None,
    tune: Annotated[
        int | None, typer.Option(help="Steps of gradient tuning of each block; from the preset.")
    ] = None,
    clip: Annotated[bool, typer.Option(help="Search narrower ranges.")] = True,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave layers whose name holds this; repeat.")
    ] = None,
    calib: Annotated[
        str,
        typer.Option(help="bundled, a .txt/.jsonl/.json file, pileval, wikitext, or owner/dataset[:config]."),
    ] = "bundled",
    split: Annotated[str | None, typer.Option(help="Of the data set.")] = None,
    text_column: Annotated[str, typer.Option(help="Of the data set or jsonl file.")] = "text",
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sample at most.")] = 512,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of float tensors: auto, float16, bfloat16.")] = "auto",
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens run at once.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare what is saved with the original at the end.")] = True,
    report: Annotated[str | None, typer.Option(help="Also write the report, with timings, here.")] = None,
    json: Annotated[str | None, typer.Option(help="The same as --report; - for stdout.")] = None,
    overrides: Annotated[
        str | None, typer.Option(help="TOML file of what is known better about the model.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in OUT.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Quantize a model. Run the same command again after an interruption: it continues."""
    from awq.config import QuantConfig

    chosen = {name: value for name, value in (("rounding", rounding), ("tune", tune)) if value is not None}
    config = QuantConfig.preset(
        preset,
        bits=bits,
        group_size=group_size,
        format=format,
        zero_point=not symmetric,
        target_bits=target_bits,
        method=method,
        clip=clip,
        dtype=dtype,
        modules_to_not_convert=tuple(skip or ()),
        **chosen,
    )
    check_target(report, out)
    check_target(json, out)
    out_console = console("-" if json == "-" else None)
    out_console.print(f"Opening {model} …", style="dim")
    from awq.pipeline import quantize

    quiet_libraries()
    with Display(out_console) as display:
        result = quantize(
            model,
            out,
            config,
            calib,
            samples=samples,
            seq_len=seq_len,
            split=split,
            text_column=text_column,
            device=device,
            batch_tokens=batch_tokens,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            overrides=overrides,
            verify=verify,
            progress=display,
        )
    print_result(out_console, out, result)
    for target in (report, json):
        write_json(result.to_dict(), target)


class TimeLeft(ProgressColumn):
    """Time left at the pace of the blocks done so far, from the first one on.

    rich's own column waits for a second step, and forgets steps of more than half a minute.
    """

    def render(self, task: Task) -> Text:
        """`h:mm:ss`, or dashes before the first block is done."""
        pace = task.fields.get("pace")
        if pace is None or task.total is None:
            return Text("-:--:--")
        left = pace * (task.total - task.completed) - (task.get_time() - task.fields["since"])
        return Text(str(datetime.timedelta(seconds=round(max(0.0, left)))))


class Display:
    """Shows a run on a terminal: the plan, a bar with the time left, and what deserves a line."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("blocks, left:"),
            TimeLeft(),
            console=out,
            transient=True,
        )
        self._task: Any = None
        self._started, self._done_before, self._blocks = 0.0, 0, 0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def planned(self, plan: Plan) -> None:
        """Print the preflight and start the bar."""
        print_plan(self._out, plan)
        self._started, self._done_before = self._bar.get_time(), plan.resumed_at
        self._blocks = plan.blocks
        self._task = self._bar.add_task("quantizing", total=plan.blocks, completed=plan.resumed_at)
        self._bar.start()

    def block_done(self, number: int, report: BlockReport) -> None:
        """Move the bar on."""
        self._bar.print(report.line(), style="dim")
        now, done = self._bar.get_time(), number + 1
        pace = (now - self._started) / (done - self._done_before)
        self._bar.update(self._task, completed=done, pace=pace, since=now)
        if done == self._blocks:
            self._bar.update(self._task, description="writing the rest, comparing with the original")

    def note(self, message: str) -> None:
        """Print a line above the bar."""
        self._bar.print(f"note: {message}", style="yellow")


def print_plan(out: Console, plan: Plan) -> None:
    """The preflight, for a person."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("model", f"{plan.architecture}, {plan.blocks} blocks")
    table.add_row("calibration", plan.calibration)
    table.add_row("quantized", f"{len(plan.quantized)} linear layers")
    for reason, names in by_reason(plan.skipped).items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        table.add_row("left float", f"{names[0]}{more}: {reason}")
    if plan.mix is not None:
        table.add_row(
            "bits of a weight", f"{plan.mix['bits']:.3f} on average: {_settings(plan.mix['layers'])}"
        )
    for kind in plan.kinds:
        dropped = [fold["producer"] for fold in kind["folds"] if not fold["proved"]]
        if dropped:
            table.add_row(
                "not scaled", f"{', '.join(dropped)} in {kind['name']}: the fold could not be proved"
            )
    table.add_row("device", f"{plan.device}, batches of {plan.batch_tokens:,} tokens")
    table.add_row("peak memory", f"about {size(plan.peak_bytes)} beyond the libraries' own")
    table.add_row("disk", f"{size(plan.disk_bytes)} while working, {size(plan.output_bytes)} in the end")
    if plan.resumed_at:
        table.add_row("continuing", f"{plan.resumed_at} of {plan.blocks} blocks were done before")
    out.print(table)


def _settings(layers: dict[str, Any]) -> str:
    """How many layers have which setting."""
    counts = Counter(tuple(setting) for setting in layers.values())
    return ", ".join(f"{n} of {bits} in groups of {size}" for (bits, size), n in sorted(counts.items()))


def print_result(out: Console, folder: str, report: Report) -> None:
    """The outcome, for a person."""
    winners: dict[str, int] = {}
    for block in report.blocks:
        winners[block.outcome["chosen"]] = winners.get(block.outcome["chosen"], 0) + 1
    error = sum(block.outcome["error"] for block in report.blocks)
    rtn = sum(block.outcome["errors"]["rtn"] for block in report.blocks)
    chosen = ", ".join(f"{name} in {count}" for name, count in sorted(winners.items()))
    if rtn:
        out.print(f"Error of the blocks: {error / rtn:.0%} of plain rounding's ({chosen} blocks).")
    seconds = report.seconds
    out.print(
        f"Done in {seconds['total']:.1f} s (forward passes {seconds.get('forward', 0):.1f} s, "
        f"search {seconds.get('search', 0):.1f} s, comparison {seconds.get('verify', 0):.1f} s); "
        f"peak memory {size(report.peak_bytes)}."
    )
    if report.verdict is not None:
        out.print(report.verdict.sentence, style=_STYLES[report.verdict.grade])
    out.print(f"{folder} holds {size(report.plan.output_bytes)} of weights and awq_report.json.")


def by_reason(skipped: dict[str, str]) -> dict[str, list[str]]:
    """Layer names grouped by why they stay float."""
    out: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        out.setdefault(reason, []).append(name)
    return out


def size(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

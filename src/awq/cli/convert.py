"""`awq convert` and `awq export`: a quantized checkpoint in another layout, or for another engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from awq.cli.common import console, write_json
from awq.cli.quantize import size

if TYPE_CHECKING:
    from awq.pipeline.convert import Conversion

Checkpoint = Annotated[str, typer.Argument(help="Quantized folder, or a hub name.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what is in OUT.")]
Json = Annotated[str | None, typer.Option(help="Write the outcome to this file; - for stdout.")]
ShardSize = Annotated[float, typer.Option(help="Size of an output file at most, in GB.")]


def command(
    checkpoint: Checkpoint,
    out: Annotated[str, typer.Argument(help="Folder to make.")],
    to: Annotated[
        str,
        typer.Option(help="gemm, gemv, gemv_fast, llm_awq, gptq, gptq_v2, compressed-tensors or mlx."),
    ],
    shard_size: ShardSize = 5.0,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Rewrite a quantized checkpoint in another layout, with the same codes, or refuse."""
    from awq.pipeline.convert import convert

    _run(
        lambda told: convert(
            checkpoint, out, to, max_shard_bytes=_bytes(shard_size), overwrite=overwrite, progress=told
        ),
        out,
        json,
    )


def export_command(
    checkpoint: Checkpoint,
    out: Annotated[str, typer.Argument(help="Folder to make; for gguf also a file.")],
    to: Annotated[str, typer.Option(help="compressed-tensors, mlx, gguf or fp16.")],
    dtype: Annotated[str | None, typer.Option(help="For fp16: float16 (the default) or bfloat16.")] = None,
    shard_size: ShardSize = 5.0,
    overwrite: Overwrite = False,
    json: Json = None,
) -> None:
    """Write a quantized checkpoint for another engine."""
    from awq.pipeline.export import export

    _run(
        lambda told: export(
            checkpoint,
            out,
            to,
            dtype=dtype,
            max_shard_bytes=_bytes(shard_size),
            overwrite=overwrite,
            progress=told,
        ),
        out,
        json,
    )


def _run(work: Callable[[Callable[[int, int], None]], Conversion], out: str, json: str | None) -> None:
    printer = console(json)
    with _bar(printer) as bar:
        task = bar.add_task("writing", total=None)
        result = work(lambda done, total: bar.update(task, completed=done, total=total))
    for note in result.notes:
        printer.print(f"note: {note}", style="yellow")
    printer.print(
        f"{out} holds {size(result.bytes)} of weights: {result.layers} layers from {result.source} to "
        f"{result.target}."
    )
    write_json(dataclasses.asdict(result), json)


def _bar(printer: Console) -> Progress:
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    return Progress(
        *columns, TextColumn("layers"), console=printer, transient=True, disable=not printer.is_terminal
    )


def _bytes(gigabytes: float) -> int:
    return max(1, int(gigabytes * 1e9))

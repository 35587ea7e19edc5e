"""`awq`: the console entry point. Errors of ours are one line; anything else is a bug, and shows where."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from awq.cli import convert, demo, evaluate, generate, inspect, quantize
from awq.errors import AwqError

app = typer.Typer(
    name="awq",
    help="Quantize Hugging Face language models to 4 bits, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        from awq import __version__

        typer.echo(f"openawq {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("quantize")(quantize.command)
app.command("eval")(evaluate.command)
app.command("generate")(generate.command)
app.command("inspect")(inspect.command)
app.command("convert")(convert.command)
app.command("export")(convert.export_command)
app.command("demo")(demo.command)


def run() -> None:
    """Run the command line; set AWQ_DEBUG=1 to see the traceback of an expected error."""
    try:
        app()
    except AwqError as error:
        if os.environ.get("AWQ_DEBUG"):
            raise
        Console(stderr=True).print(
            f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; a quantization continues when the same command is run again")
        sys.exit(130)


if __name__ == "__main__":
    run()

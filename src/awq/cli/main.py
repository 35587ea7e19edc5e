"""`awq`: the console entry point. Errors of ours are one line; anything else is a bug, and shows where."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from awq.cli import bench, convert, demo, doctor, evaluate, generate, inspect, quantize
from awq.errors import AwqError


class _Interrupted(Exception):  # noqa: N818 (not an error: the user's wish)
    pass


class _Commands(TyperGroup):
    """Lets an interruption through to `run`, where typer would end the process without a word.

    An interruption inside a library's C code can come out as that library's own error (reading safetensors
    gives a ValueError); what matters is that the user pressed Ctrl-C.
    """

    def invoke(self, ctx: Any) -> Any:
        pressed: list[int] = []
        with _noted(pressed):
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                raise _Interrupted from None
            except Exception:
                if pressed:
                    raise _Interrupted from None
                raise


@contextmanager
def _noted(pressed: list[int]) -> Iterator[None]:
    """Note each Ctrl-C in `pressed`, and raise as usual; where it is ignored or handled already, so be it."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


app = typer.Typer(
    name="awq",
    cls=_Commands,
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
app.command("bench")(bench.command)
app.command("doctor")(doctor.command)
app.command("demo")(demo.command)


def run() -> None:
    """Run the command line; set AWQ_DEBUG=1 to see the traceback of an expected error."""
    _spin_shortly()
    try:
        app()
    except AwqError as error:
        if os.environ.get("AWQ_DEBUG"):
            raise
        _say(Text.assemble(("error:", "bold red"), " ", " ".join(str(error).split())))
        sys.exit(1)
    except (_Interrupted, KeyboardInterrupt):
        _say("interrupted; a quantization continues when the same command is run again")
        sys.exit(130)


def _spin_shortly() -> None:
    """Let PyTorch's idle threads sleep soon, unless the user has said how they shall wait.

    GNU's OpenMP lets them spin as long as there are as many cores as threads, also when other processes want
    the cores: then each parallel loop waits for a thread that waits for a core on which another one spins. To
    sleep at once would cost a third of the speed on an idle machine, because between two products there is
    hardly time to sleep. This is long enough for that (`docs/speed.md`). Read when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _say(message: str | Text) -> None:
    Console(stderr=True).print(message, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    run()

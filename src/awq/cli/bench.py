"""`awq bench`: how fast a model prefills and decodes, beside another one, and how near to the limit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from awq.cli.common import console, load_model, quiet_libraries, write_json
from awq.cli.quantize import size
from awq.errors import ConfigError


def command(
    model: Annotated[str, typer.Argument(help="Folder or hub name; float or quantized.")],
    against: Annotated[str | None, typer.Option(help="Another one, measured by turns with it.")] = None,
    batch: Annotated[str, typer.Option(help="Sequences at once, comma-separated.")] = "1,4,16",
    prefill: Annotated[str, typer.Option(help="Tokens of each prompt, comma-separated.")] = "64,512,2048",
    decode: Annotated[int, typer.Option(help="Tokens to generate after the first.")] = 128,
    repeats: Annotated[int, typer.Option(help="Rounds that count; one before them does not.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16")] = "auto",
    kernel: Annotated[str | None, typer.Option(help="Insist on a kernel for the quantized layers.")] = None,
    head_bits: Annotated[
        int | None, typer.Option(help="8 rounds the output head of a quantized model, on a CPU.")
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Fewer calls for each token of a quantized model.")
    ] = False,
    json: Annotated[str | None, typer.Option(help="Write the figures to this file; - for stdout.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Measure prefill and decode speed, time to the first token, and memory."""
    batches, prompts = _numbers("--batch", batch), _numbers("--prefill", prefill)
    if decode < 1 or repeats < 1:
        raise ConfigError("--decode and --repeats must be at least 1")
    from awq.evaluate import copy_bandwidth, throughput

    quiet_libraries()
    out = console(json)
    names = [model] if against is None else [against, model]
    options: dict[str, Any] = {"kernel": kernel, "head_bits": head_bits, "fuse": fuse}
    loaded = {name: load_model(name, dtype, device, trust_remote_code, **options) for name in names}
    room = min(_context(each) for each in loaded.values())
    sizes = [(b, p) for b in batches for p in prompts if p + decode + 1 <= room]
    if not sizes:
        raise ConfigError(f"no prompt of --prefill and {decode + 1} tokens fit the model's context of {room}")
    bandwidth = copy_bandwidth(str(next(iter(loaded.values())).device))
    rows: list[dict[str, Any]] = []
    figures = {"copy_bandwidth": bandwidth, "dtypes": _dtypes(loaded), "rows": rows}
    with out.status("measuring") as status:
        for number, (sequences, tokens) in enumerate(sizes):
            status.update(f"measuring batch {sequences}, prompts of {tokens}: {number + 1} of {len(sizes)}")
            found = throughput(loaded, sequences, tokens, decode, repeats)
            rows += [{"model": name} | dataclasses.asdict(each) for name, each in found.items()]
            if json != "-":  # what has been measured is kept, whatever happens to the rest
                write_json(figures, json)
    out.print(_table(rows, bandwidth, loaded))
    left = sorted(set(prompts) - {p for _, p in sizes})
    if left:
        out.print(f"left out, because the context ends at {room}: prompts of {', '.join(map(str, left))}")
    out.print(
        f"Median, lowest and highest of {repeats} rounds, random tokens, {decode} of them decoded by greedy "
        f"`generate`. Copying large tensors reaches {bandwidth / 1e9:.1f} GB/s here; `weights read` is a "
        "share of that. `memory` is the weights, below it, and what was taken on top."
    )
    write_json(figures, json)


def _numbers(option: str, words: str) -> list[int]:
    try:
        numbers = [int(word) for word in words.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option} takes whole numbers of at least 1, separated by commas, not {words!r}")
    return numbers


def _context(model: Any) -> int:
    """Tokens that a sequence can have."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 1 << 31


def _dtypes(loaded: dict[str, Any]) -> dict[str, str]:
    return {name: str(model.dtype).removeprefix("torch.") for name, model in loaded.items()}


def _table(rows: list[dict[str, Any]], bandwidth: float, loaded: dict[str, Any]) -> Table:
    device, names = next(iter(loaded.values())).device, _short(list(loaded))
    table = Table(title=f"on {device}: {', '.join(f'{names[k]} in {v}' for k, v in _dtypes(loaded).items())}")
    for column in ("batch x\nprompt", "model", "first\ntoken", "prefill\ntokens/s", "decode\ntokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for column in ("weights\nread", "memory\nweights"):
        table.add_column(column, justify="right")
    base: dict[str, Any] = {}
    for row in rows:
        if row["model"] == next(iter(loaded)):
            base = row
        share = "-" if row["read_speed"] is None else f"{row['read_speed'] / bandwidth:.0%}"
        table.add_row(
            f"{row['batch']} x {row['prefill']}",
            names[row["model"]],
            f"{row['first_token']['median'] * 1e3:.0f} ms",
            *(_spread(row[speed], base[speed]) for speed in ("prefill_speed", "decode_speed")),
            share,
            f"{'-' if row['peak'] is None else size(row['peak'])}\n{size(row['weights'])}",
        )
    return table


def _short(names: list[str]) -> dict[str, str]:
    """The last part of each path, where that tells them apart."""
    last = {name: Path(name).name or name for name in names}
    return last if len(set(last.values())) == len(names) else {name: name for name in names}


def _spread(speed: dict[str, float], base: dict[str, float]) -> str:
    """Median, lowest and highest; and how many times another model's median."""
    median, low, high = (f"{n:.1f}" if n < 100 else f"{n:.0f}" for n in speed.values())
    told = f"{median}\n{low}-{high}"
    return told if speed is base else f"{told}\n{speed['median'] / base['median']:.2f}x"

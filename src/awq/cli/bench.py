"""`awq bench`: how fast a model prefills and decodes, beside another one, and how near to the limit."""

from __future__ import annotations

import dataclasses
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
    loaded = {name: load_model(name, dtype, device, trust_remote_code, kernel=kernel) for name in names}
    room = min(_context(each) for each in loaded.values())
    sizes = [(b, p) for b in batches for p in prompts if p + decode + 1 <= room]
    if not sizes:
        raise ConfigError(f"no prompt of --prefill and {decode + 1} tokens fit the model's context of {room}")
    bandwidth = copy_bandwidth(str(next(iter(loaded.values())).device))
    rows = []
    for sequences, tokens in sizes:
        found = throughput(loaded, sequences, tokens, decode, repeats)
        rows += [{"model": name} | dataclasses.asdict(each) for name, each in found.items()]
    out.print(_table(rows, bandwidth, loaded))
    left = sorted(set(prompts) - {p for _, p in sizes})
    if left:
        out.print(f"left out, because the context ends at {room}: prompts of {', '.join(map(str, left))}")
    out.print(
        f"Median of {repeats} rounds (lowest to highest), random tokens, greedy `generate`. Copying large "
        f"tensors reaches {bandwidth / 1e9:.1f} GB/s here; `weights read` is a share of that."
    )
    write_json({"copy_bandwidth": bandwidth, "dtypes": _dtypes(loaded), "rows": rows}, json)


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
    device = next(iter(loaded.values())).device
    table = Table(title=f"on {device}: {', '.join(f'{k} in {v}' for k, v in _dtypes(loaded).items())}")
    for column in ("batch", "prompt", "model", "first token", "prefill", "decode", "weights read", "memory"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        share = "-" if row["read_speed"] is None else f"{row['read_speed'] / bandwidth:.0%}"
        peak = "-" if row["peak"] is None else size(row["peak"])
        table.add_row(
            str(row["batch"]),
            str(row["prefill"]),
            row["model"],
            f"{row['first_token']['median'] * 1e3:.0f} ms",
            _spread(row["prefill_speed"]),
            _spread(row["decode_speed"]),
            share,
            f"{peak}, weights {size(row['weights'])}",
        )
    return table


def _spread(speed: dict[str, float]) -> str:
    return f"{speed['median']:.1f} tok/s ({speed['low']:.1f}-{speed['high']:.1f})"

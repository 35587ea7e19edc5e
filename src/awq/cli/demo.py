"""`awq demo`: the whole road on the model that ships with the package, with no network."""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from awq.cli.common import console, load_model, load_tokenizer, quiet_libraries, write_json
from awq.cli.quantize import Display, size
from awq.errors import ConfigError

_PROMPT = "The captain looked at the sea and"
_SEQ_LEN = 256


def command(
    out: Annotated[
        str | None, typer.Option(help="Keep the checkpoints here; a temporary folder else.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples of 256 tokens.")] = 128,
    windows: Annotated[int, typer.Option(help="Evaluation windows of 256 tokens.")] = 100,
    json: Annotated[str | None, typer.Option(help="Write the figures to this file; - for stdout.")] = None,
) -> None:
    """Quantize the bundled model by plain rounding and by AWQ, and compare both with the original."""
    if samples < 1 or windows < 2:
        raise ConfigError("--samples must be at least 1 and --windows at least 2")
    printer = console(json)
    original = str(resources.files("awq").joinpath("data/books6m"))
    with tempfile.TemporaryDirectory(prefix="awq-demo-") as temporary:
        base = Path(out) if out else Path(temporary)
        folders = {"original": original, "plain rounding": str(base / "rtn"), "AWQ": str(base / "awq")}
        _quantize(printer, original, folders, samples, overwrite=out is None)
        rows = _judge(folders, windows)
        _print_table(printer, rows)
        for name, row in rows.items():
            printer.print(Text.assemble("\n", (name, "bold"), ": ", row["text"]))
        if out:
            printer.print(f"\nThe checkpoints are in {base}.")
        write_json(rows, json)


def _quantize(
    printer: Console, original: str, folders: dict[str, str], samples: int, overwrite: bool
) -> None:
    from awq.calibration import load_calibration
    from awq.config import QuantConfig
    from awq.pipeline import quantize

    quiet_libraries()
    tokenizer = load_tokenizer(original)
    calibration = load_calibration("bundled", tokenizer, samples=samples, seq_len=_SEQ_LEN).describe()
    for name, method in (("plain rounding", "rtn"), ("AWQ", "awq")):
        config = QuantConfig(method=method)  # type: ignore[arg-type]
        if not overwrite and _is_done(Path(folders[name]), Path(original), config.to_dict(), calibration):
            printer.print(f"{folders[name]} is finished already.")
            continue
        printer.print(f"Quantizing {original} by {name} …")
        with Display(printer) as display:
            quantize(
                original,
                folders[name],
                config,
                tokenizer=tokenizer,
                samples=samples,
                seq_len=_SEQ_LEN,
                overwrite=overwrite,
                verify=False,  # both are judged together afterwards, at length
                progress=display,
            )


def _is_done(folder: Path, original: Path, config: dict[str, Any], calibration: str) -> bool:
    """Whether an earlier run, which may have been killed behind it, left this very checkpoint here."""
    from awq.model import read_json
    from awq.pipeline.finish import REPORT_NAME
    from awq.pipeline.journal import is_finished

    if not is_finished(folder) or not (folder / REPORT_NAME).exists():
        return False
    found = read_json(folder / "config.json")
    found.pop("quantization_config", None)
    report = read_json(folder / REPORT_NAME)
    made = (report.get("config"), report.get("plan", {}).get("calibration"))
    return found == read_json(original / "config.json") and made == (config, calibration)


def _judge(folders: dict[str, str], windows: int) -> dict[str, dict[str, Any]]:
    """Size, perplexity, divergence, speed and a sample of each."""
    import torch

    from awq.evaluate import compare, generation_speeds, token_ids

    tokenizer = load_tokenizer(folders["original"])
    ids = token_ids("bundled", tokenizer)
    reference = load_model(folders["original"], "float32", "cpu")
    rows: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        exact = load_model(folder, "float32", "cpu", exact=True)
        result = compare(exact, reference, ids, window=256, max_tokens=windows * 256)
        rows[name] = {
            "bytes": sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")),
            "perplexity": result.perplexity.value,
            "perplexity_stderr": result.perplexity.stderr,
            "kl": result.kl,
            "kl_stderr": result.kl_stderr,
            "top1": result.top1,
            "definition": result.perplexity.definition(),
        }
    running = {name: load_model(folder) for name, folder in folders.items()}
    prompt = torch.tensor([tokenizer(_PROMPT)["input_ids"]])
    speeds = generation_speeds(running, prompt, new_tokens=64, repeats=5)
    for name, model in running.items():
        text = model.generate(
            prompt.to(model.device),
            attention_mask=torch.ones_like(prompt).to(model.device),
            max_new_tokens=48,
            do_sample=False,
        )
        rows[name] |= {
            "tokens_per_second": speeds[name].median,
            "tokens_per_second_range": [speeds[name].low, speeds[name].high],
            "text": " ".join(tokenizer.decode(text[0], skip_special_tokens=True).split()),
        }
    return rows


def _print_table(printer: Console, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title="4 bits in groups of 128, on unseen books")
    for column in ("model", "weights on disk", "perplexity", "KL to the original", "tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            size(row["bytes"]),
            f"{row['perplexity']:.3f} ± {row['perplexity_stderr']:.3f}",
            f"{row['kl']:.5f} ± {row['kl_stderr']:.5f}",
            f"{row['tokens_per_second']:.0f}",
        )
    printer.print(table)
    first = next(iter(rows.values()))
    printer.print(f"Perplexity: {first['definition']}. KL in nats per token. The embeddings stay float.")

"""`awq eval`: perplexity, and with `--against` how far a model is from its original; tasks with `--tasks`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.table import Table

from awq.cli.common import console, load_model, load_tokenizer, quiet_libraries, write_json
from awq.errors import ConfigError


def command(
    model: Annotated[str, typer.Argument(help="Folder or hub name; float or quantized.")],
    text: Annotated[str, typer.Option(help="Text or jsonl file, or `bundled`.")] = "bundled",
    against: Annotated[str | None, typer.Option(help="The original to compare with.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; the window by default.")] = None,
    documents: Annotated[bool, typer.Option(help="Each document by itself, instead of joined.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Use the beginning of the text only.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows run at once.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on the CPU, else the model's own), float32, float16, bfloat16")
    ] = "auto",
    head_bits: Annotated[
        int | None, typer.Option(help="8 rounds the output head of a quantized model, on a CPU.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Run these tasks of lm-evaluation-harness instead, comma-separated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Samples of each task; all by default.")] = None,
    fewshot: Annotated[int | None, typer.Option(help="Examples before each question of a task.")] = None,
    include_path: Annotated[str | None, typer.Option(help="Folder with further tasks (YAML).")] = None,
    json: Annotated[str | None, typer.Option(help="Write the figures to this file; - for stdout.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Judge a model on a text: perplexity, KL divergence and agreement with the original. Or on tasks."""
    from awq.evaluate import compare, document_ids, perplexity, token_ids
    from awq.model import pick_device, read_json
    from awq.model.fetch import resolve

    if tasks is None and (limit is not None or fewshot is not None or include_path is not None):
        raise ConfigError("--limit, --fewshot and --include-path belong to --tasks")
    if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise ConfigError("--batch-size and --max-tokens must be at least 1")
    quiet_libraries()
    out = console(json)
    if dtype == "auto" and pick_device(device).type == "cpu":
        dtype = "float32"
    options: dict[str, Any]
    for folder in (model, against):
        if folder is not None:
            read_json(resolve(folder) / "config.json")  # what is missing is known before anything is loaded
    if tasks is not None:
        options = {"limit": limit, "fewshot": fewshot, "include_path": include_path, "batch_size": batch_size}
        models = [model] if against is None else [against, model]
        _tasks(models, tasks, (dtype, device, trust_remote_code), options, json, head_bits)
        return
    ids = (document_ids if documents else token_ids)(text, load_tokenizer(model, trust_remote_code))
    judged = load_model(model, dtype, device, trust_remote_code, exact=True, head_bits=head_bits)
    longest = getattr(judged.config.get_text_config(), "max_position_embeddings", None) or window
    options = {
        "window": min(window, longest),
        "stride": stride,
        "max_tokens": max_tokens,
        "batch_size": batch_size,
    }
    table = Table(title=f"{model} on {text} ({str(judged.dtype).removeprefix('torch.')})")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("± standard error", justify="right")
    figures: dict[str, Any] = {"model": model, "text": text, "dtype": str(judged.dtype)}
    if against is None:
        ppl = perplexity(judged, ids, **options)
        figures["perplexity"] = dataclasses.asdict(ppl)
    else:
        reference = load_model(against, dtype, device, trust_remote_code, exact=True)
        if reference.config.get_text_config().vocab_size != judged.config.get_text_config().vocab_size:
            raise ConfigError(f"{model} and {against} have different vocabularies and cannot be compared")
        result = compare(judged, reference, ids, **options)
        ppl, original = result.perplexity, result.reference_perplexity
        table.add_row("perplexity of the original", f"{original.value:.4f}", f"{original.stderr:.4f}")
        table.add_row("KL divergence (nats)", f"{result.kl:.6f}", f"{result.kl_stderr:.6f}")
        table.add_row("top-1 agreement", f"{result.top1:.4%}", f"{result.top1_stderr:.4%}")
        figures |= {"against": against} | dataclasses.asdict(result)
    table.add_row("perplexity", f"{ppl.value:.4f}", f"{ppl.stderr:.4f}")
    out.print(table)
    out.print(f"perplexity: {ppl.definition()}")
    write_json(figures, json)


def _tasks(
    models: list[str],
    tasks: str,
    loading: tuple[str, str, bool],
    options: dict[str, Any],
    json: str | None,
    head_bits: int | None,
) -> None:
    """Run tasks on each model, and print a table with a column for each; `head_bits` are of the last one."""
    from awq.evaluate import run_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    table = Table(title=f"tasks of lm-evaluation-harness ({loading[0]})")
    for column in ("task", "metric", "samples", *models):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    scores = []
    for number, model in enumerate(models, 1):
        bits = head_bits if number == len(models) else None
        loaded = load_model(model, *loading, exact=True, head_bits=bits)
        scores.append(run_tasks(loaded, load_tokenizer(model, loading[2]), names, **options))
        del loaded
    for row in zip(*scores, strict=True):
        cells = [
            f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")
            for score in row
        ]
        table.add_row(row[0].task, row[0].metric, str(row[0].samples), *cells)
    console(json).print(table)
    figures = [
        {"model": model, "tasks": [dataclasses.asdict(score) for score in found]}
        for model, found in zip(models, scores, strict=True)
    ]
    write_json(figures, json)

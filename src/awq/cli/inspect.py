"""`awq inspect`: what a checkpoint holds, or what quantizing a float model would do to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from awq.cli.common import console, quiet_libraries, write_json
from awq.cli.quantize import by_reason, size


def command(
    model: Annotated[str, typer.Argument(help="Folder or hub name; float or quantized.")],
    group_size: Annotated[int, typer.Option(help="For a float model: the group size to plan with.")] = 128,
    json: Annotated[str | None, typer.Option(help="Write the figures to this file; - for stdout.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Show a quantized checkpoint's layers, or a float model's discovered structure."""
    from awq.config import QuantConfig
    from awq.hf import is_awq
    from awq.model.fetch import resolve

    quiet_libraries()
    folder = resolve(model)
    out = console(json)
    if is_awq(folder):
        value = checkpoint_facts(folder)
        print_checkpoint(out, model, value)
    else:
        from awq.pipeline import structure_of

        value = structure_of(folder, QuantConfig(group_size=group_size), trust_remote_code)
        print_structure(out, model, value)
    write_json(value, json)


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """What an AWQ checkpoint holds, read from headers and config.json alone."""
    from awq.model import CheckpointReader, read_json
    from awq.model.weights import FLOAT_DTYPES

    tensors = CheckpointReader(folder).tensors
    entry = read_json(folder / "config.json")["quantization_config"]
    layers: dict[str, int] = {}
    weights = quantized_bytes = 0
    float_bytes = 0
    for name, info in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            count = info.shape[0] * info.shape[1] * 8
            weights += count
            layers[stem] = info.shape[0] // tensors[f"{stem}.scales"].shape[0]
        if f"{stem}.qweight" in tensors and leaf in ("qweight", "qzeros", "scales"):
            quantized_bytes += info.bytes
        elif info.dtype in FLOAT_DTYPES:
            float_bytes += info.bytes
    total = sum(info.bytes for info in tensors.values())
    groups = sorted(set(layers.values()))
    return {
        "layout": str(entry.get("version", "gemm")).lower(),
        "bits": entry.get("bits", 4),
        "quantized_layers": len(layers),
        "group_sizes": groups,
        "bits_per_quantized_weight": quantized_bytes * 8 / weights if weights else None,
        "quantized_weights": weights,
        "bytes": total,
        "float_bytes": float_bytes,
        "left_float": entry.get("modules_to_not_convert") or [],
        "layers": layers,
    }


def print_checkpoint(out: Console, model: str, value: dict[str, Any]) -> None:
    """The facts as a table."""
    table = Table(title=model, show_header=False)
    per_weight = value["bits_per_quantized_weight"]
    table.add_row("layout", f"{value['layout']}, {value['bits']} bits")
    table.add_row("quantized layers", f"{value['quantized_layers']}, {value['quantized_weights']:,} weights")
    table.add_row("group sizes", ", ".join(map(str, value["group_sizes"])) or "none")
    table.add_row("bits per quantized weight", f"{per_weight:.3f}" if per_weight else "none")
    table.add_row("size", f"{size(value['bytes'])}, of which {size(value['float_bytes'])} float")
    table.add_row("left float", ", ".join(value["left_float"]) or "embeddings and norms only")
    out.print(table)


def print_structure(out: Console, model: str, value: dict[str, Any]) -> None:
    """The discovered structure as a tree."""
    tree = Tree(f"{model}: {value['architecture']}, {value['blocks']} blocks in {value['list']}")
    for kind in value["kinds"]:
        blocks = kind["blocks"]
        branch = tree.add(f"{kind['name']} x {len(blocks)} (first: {blocks[0]})")
        for fold in kind["folds"]:
            verdict = "proved" if fold["proved"] else "dropped"
            branch.add(
                f"{fold['producer']} → {', '.join(fold['consumers'])}: {fold['channels']} channels, "
                f"{verdict} (output changed by {fold['change']:.0e})"
            )
        if kind["unscaled"]:
            branch.add(f"quantized without scaling: {', '.join(kind['unscaled'])}")
        for reason, names in by_reason(kind["skipped"]).items():
            branch.add(f"left float: {', '.join(names)}: {reason}")
    out.print(tree)

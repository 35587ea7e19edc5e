"""`awq inspect`: what a checkpoint holds, or what quantizing a float model would do to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from awq.cli.common import console, quiet_libraries, write_json
from awq.cli.quantize import size
from awq.cli.structure import structure_tree


def command(
    model: Annotated[str, typer.Argument(help="Folder or hub name; float or quantized.")],
    group_size: Annotated[int, typer.Option(help="For a float model: the group size to plan with.")] = 128,
    json: Annotated[str | None, typer.Option(help="Write the figures to this file; - for stdout.")] = None,
    overrides: Annotated[
        str | None, typer.Option(help="For a float model: TOML file of what is known better about it.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Show a quantized checkpoint's layers, or a float model's discovered structure."""
    from awq.config import QuantConfig
    from awq.model.fetch import resolve
    from awq.model.quantized import quantization_entry
    from awq.model.weights import read_json

    quiet_libraries()
    folder = resolve(model)
    out = console(json)
    if quantization_entry(folder, read_json(folder / "config.json")) is not None:
        value = checkpoint_facts(folder)
        print_checkpoint(out, model, value)
    else:
        from awq.model.overrides import Overrides
        from awq.pipeline import structure_of

        value = structure_of(
            folder, QuantConfig(group_size=group_size), trust_remote_code, Overrides.of(overrides)
        )
        out.print(structure_tree(model, value), soft_wrap=False)
    write_json(value, json)


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """What a quantized checkpoint holds, in any layout, read from headers and its configuration alone."""
    from awq.formats.engines import engine_notes, tensor_parallel
    from awq.model.quantized import QuantizedCheckpoint
    from awq.model.weights import FLOAT_DTYPES

    checkpoint = QuantizedCheckpoint(folder)
    tensors = checkpoint.reader.tensors
    shapes = {name: layer.shape for name, layer in checkpoint.layers.items()}
    weights = sum(shape.out_features * shape.in_features for shape in shapes.values())
    quantized = {key for layer in checkpoint.layers.values() for key in layer.keys.values()}
    quantized_bytes = sum(tensors[key].bytes for key in quantized)
    floats = [info for key, info in tensors.items() if key not in quantized and info.dtype in FLOAT_DTYPES]
    gemm = checkpoint.detected.layout == "gemm"
    return {
        "layout": checkpoint.detected.layout,
        "bits": checkpoint.detected.bits,
        "quantized_layers": len(shapes),
        "group_sizes": sorted({shape.group_size for shape in shapes.values()}),
        "bits_per_quantized_weight": quantized_bytes * 8 / weights,
        "quantized_weights": weights,
        "bytes": sum(info.bytes for info in tensors.values()),
        "float_bytes": sum(info.bytes for info in floats),
        "left_float": list(checkpoint.detected.skipped),
        "layers": {name: shape.group_size for name, shape in shapes.items()},
        "engines": engine_notes(shapes, checkpoint.detected.group_size) if gemm else {},
        "tensor_parallel": tensor_parallel(shapes) if gemm else [],
    }


def print_checkpoint(out: Console, model: str, value: dict[str, Any]) -> None:
    """The facts as a table."""
    table = Table(title=model, show_header=False)
    table.add_row("layout", f"{value['layout']}, {value['bits']} bits")
    table.add_row("quantized layers", f"{value['quantized_layers']}, {value['quantized_weights']:,} weights")
    table.add_row("group sizes", ", ".join(map(str, value["group_sizes"])))
    table.add_row("bits per quantized weight", f"{value['bits_per_quantized_weight']:.3f}")
    table.add_row("size", f"{size(value['bytes'])}, of which {size(value['float_bytes'])} float")
    table.add_row("left float", ", ".join(value["left_float"]) or "embeddings and norms only")
    for engine, note in value["engines"].items():
        table.add_row(engine, note)
    if value["engines"]:
        table.add_row("tensor parallel", ", ".join(map(str, [1, *value["tensor_parallel"]])))
    out.print(table)

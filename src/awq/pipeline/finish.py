"""The end of a run: everything that was not touched is carried over, and the folder becomes a checkpoint.

`config.json` is written last: a folder without it looks unfinished to every loader.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from awq.config import PLAIN_FORMATS, QuantConfig, Setting
from awq.errors import WeightError
from awq.formats.entry import entry_for
from awq.model import Skeleton
from awq.model.weights import FLOAT_DTYPES
from awq.pipeline.journal import Journal
from awq.pipeline.preflight import Files, storage_dtype
from awq.pipeline.report import Report, write_json
from awq.pipeline.writer import ShardWriter, disk_errors

REPORT_NAME = "awq_report.json"
# Weights in other spellings, which would contradict the quantized ones.
_FOREIGN_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt")
INDEXES = {"model.safetensors.index.json", "pytorch_model.bin.index.json"}
_REWRITTEN = {"config.json", REPORT_NAME} | INDEXES


def finish(
    skeleton: Skeleton,
    files: Files,
    writer: ShardWriter,
    journal: Journal,
    out: Path,
    config: QuantConfig,
    skipped: list[str],
    layers: Mapping[str, Setting],
    report: Report,
) -> None:
    """Carry over untouched tensors and files, publish the shards, and write the configuration.

    Args:
        skipped: names, as the checkpoint has them, of every linear layer left float.
        layers: the quantized ones, and what each is quantized to.
    """
    for key in () if journal.complete else files.copies:
        info = skeleton.reader.tensors[key]
        tensor = skeleton.reader.read_one(key)
        if info.dtype in FLOAT_DTYPES:
            tensor = cast(tensor, files.dtypes[key], key)
        writer.write([(key, tensor)])
    journal.complete = True
    journal.save()
    writer.publish(out)
    copy_files(skeleton.folder, out, _REWRITTEN)
    write_json(out / REPORT_NAME, report.to_dict(timings=False))
    write_json(out / "config.json", _config(skeleton, config, skipped, layers))


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` in its storage dtype.

    Raises:
        WeightError: a value is too large for it.
    """
    out = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not bool(torch.isfinite(out).all()):
        raise WeightError(f"{name} has values that float16 cannot hold; use dtype bfloat16")
    return out


def _config(
    skeleton: Skeleton, config: QuantConfig, skipped: list[str], layers: Mapping[str, Setting]
) -> dict[str, object]:
    value = dict(skeleton.raw_config)
    value.pop("quantization_config", None)  # an empty one, as some tools write it
    if config.format not in PLAIN_FORMATS:
        symmetric = not config.zero_point
        value |= entry_for(config.format, *config.setting, skipped, symmetric=symmetric, layers=layers)
    if config.dtype != "auto" or config.format == "mlx":
        value.pop("torch_dtype", None)
        dtype = storage_dtype(config, "F32") if config.dtype == "auto" else getattr(torch, config.dtype)
        value["dtype"] = str(dtype).removeprefix("torch.")
    return value


def copy_files(folder: Path, out: Path, rewritten: Collection[str]) -> None:
    """Copy what is no weight: tokenizer, processor, chat template, generation settings, code, licence.

    Args:
        folder, out: from where to where.
        rewritten: names of files that are written anew, or have no meaning any more.
    """
    for path, relative in visible_files(folder):
        if str(relative) in rewritten or path.suffix in _FOREIGN_WEIGHTS:
            continue
        if out.resolve() in path.resolve().parents:
            continue  # the output folder lies inside the model's
        target = out / relative
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def visible_files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Every file below a folder, with its place there, but for hidden ones and those in hidden folders."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield path, relative

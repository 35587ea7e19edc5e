"""Put a finished checkpoint where the user wants it, in files of the size the user wants."""

from __future__ import annotations

import shutil
from pathlib import Path

from awq.errors import OutputError, OutputExistsError
from awq.model.weights import CheckpointReader, read_json
from awq.pipeline.finish import REPORT_NAME, visible_files
from awq.pipeline.output import move_files
from awq.pipeline.writer import ShardPlan, ShardWriter, TensorPlan, disk_errors, gathered, plan_shards

_STAGING = ".awq-saving"
_INDEX = "model.safetensors.index.json"
# What a save replaces; any other file that is there already (a tokenizer saved before) stays as it is.
_REPLACED = ("config.json", "generation_config.json", REPORT_NAME, _INDEX)


def publish(source: Path, out: Path, max_shard_bytes: int, move: bool = False) -> None:
    """Write the checkpoint in `source` to `out`.

    Everything is put together in a working folder inside `out` first; an earlier save there is then replaced,
    its `config.json` being the first to go and the new one the last to come.

    Args:
        source: a finished checkpoint.
        out: a folder: new, or without a model, or with a checkpoint that OpenAWQ or AutoAWQ wrote.
        max_shard_bytes: weight files hold at most this much (a larger tensor stands alone).
        move: the weight files of `source` may be moved away, which is quick and takes no second room.

    Raises:
        OutputExistsError: `out` holds another model.
        OutputError: it cannot be written.
    """
    reader = CheckpointReader(source)
    plans = [TensorPlan(name, info.dtype, info.shape, info.bytes) for name, info in reader.tensors.items()]
    shards = plan_shards(plans, max_shard_bytes, sorted(reader.unused))
    as_it_is = _same_files(reader, shards)
    if out.exists() and source.resolve() == out.resolve() and as_it_is:
        return
    _check(out)
    staging = out / _STAGING
    with disk_errors(out):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    if as_it_is:
        for name in reader.files:
            with disk_errors(staging / name):
                (shutil.move if move else shutil.copyfile)(source / name, staging / name)
    else:
        writer = ShardWriter(staging, shards)
        for part in gathered(reader.read(list(reader.tensors))):
            writer.write(part)
        writer.publish(staging)
    _copy_others(source, staging, out, index=as_it_is)
    _replace(staging, out)


def _same_files(reader: CheckpointReader, shards: list[ShardPlan]) -> bool:
    """Whether the files are laid out as planned already."""
    planned = {name: shard.name for shard in shards for name in shard.places}
    return planned == {name: info.file for name, info in reader.tensors.items()}


def _check(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder to save to")
    holds_weights = any(path.suffix in (".safetensors", ".bin", ".pth") for path in out.iterdir())
    if not holds_weights or (out / REPORT_NAME).exists():
        return
    config = out / "config.json"
    if not config.exists() or "quantization_config" not in read_json(config):
        raise OutputExistsError(f"{out} holds another model; choose another folder to save to")


def _copy_others(source: Path, staging: Path, out: Path, index: bool) -> None:
    """Copy what is no weight, unless `out` has its own."""
    for path, relative in visible_files(source):
        if path.suffix == ".safetensors" or (path.name == _INDEX and not index):
            continue
        if (out / relative).exists() and str(relative) not in _REPLACED:
            continue
        with disk_errors(staging / relative):
            (staging / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / relative)


def _replace(staging: Path, out: Path) -> None:
    """Take the old model away and put the new one in its place, `config.json` last."""
    with disk_errors(out):
        old = [out / "config.json", out / _INDEX, *out.glob("model.safetensors"), *out.glob("model-*-of-*")]
        for path in old:
            path.unlink(missing_ok=True)
        move_files(staging, out)
        shutil.rmtree(staging)

"""What leaves for other engines: one door to the conversions that they want."""

from __future__ import annotations

from pathlib import Path

import torch

from awq.errors import ConfigError
from awq.pipeline.convert import Conversion, Told, convert, write_plain
from awq.pipeline.writer import DEFAULT_SHARD_BYTES

EXPORTS = ("compressed-tensors", "mlx", "gguf", "fp16")


def export(
    checkpoint: str | Path,
    out: str | Path,
    to: str,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Told | None = None,
) -> Conversion:
    """Write a quantized checkpoint for another engine.

    Args:
        checkpoint: a folder, or a hub name, in any layout that `awq.formats` reads.
        out: the folder to make; for `gguf` a file may be named too.
        to: `compressed-tensors` and `mlx` hold the same codes; `gguf` holds them in Q4_1 blocks; `fp16` is
            the dequantized model, which any loader takes for a float one.
        dtype: of the weights, for `fp16`: float16 (the default) or bfloat16.
        max_shard_bytes: size of an output file at most. A GGUF is always one.
        overwrite: replace what is in `out`.
        progress: told the layers done, and how many there are.

    Raises:
        ConfigError: the target is unknown, or cannot hold a layer, which is named.
        MissingFileError, CorruptFileError: the checkpoint is damaged, or holds what has no exact form.
        MissingDependencyError: the gguf package is not installed.
        OutputError: the output cannot be written, or exists.
    """
    if to not in EXPORTS:
        raise ConfigError(f"target {to!r} is unknown; choose one of: {', '.join(EXPORTS)}")
    if dtype is not None and (to != "fp16" or dtype not in ("float16", "bfloat16")):
        raise ConfigError(f"dtype={dtype} has no meaning for {to}; fp16 takes float16 or bfloat16")
    if to == "gguf":
        from awq.pipeline.gguf import write_gguf

        return write_gguf(checkpoint, out, overwrite=overwrite, progress=progress)
    if to == "fp16":
        return write_plain(
            checkpoint,
            out,
            getattr(torch, dtype or "float16"),
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            progress=progress,
        )
    return convert(
        checkpoint, out, to, max_shard_bytes=max_shard_bytes, overwrite=overwrite, progress=progress
    )

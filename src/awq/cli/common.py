"""What the commands share: consoles, JSON, and loading whatever model is named."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

from awq.errors import ConfigError, OutputError

DTYPES = ("auto", "float32", "float16", "bfloat16")


def console(json_to: str | None = None) -> Console:
    """For people; on the standard error stream when JSON goes to the standard output.

    Raises:
        OutputError: JSON is to go to a file that cannot be; better known before the work.
    """
    check_target(json_to)
    # Names of files may hold brackets, which rich would read as its markup.
    return Console(stderr=json_to == "-", soft_wrap=True, highlight=False, markup=False)


def check_target(target: str | None, out: str | None = None) -> None:
    """Refuse a file whose folder does not exist, unless it is `out`, which is going to be made.

    Raises:
        OutputError: the file cannot be written.
    """
    if target is None or target == "-":
        return
    path = Path(target)
    if path.is_dir() or not (path.parent.is_dir() or (out and path.parent == Path(out))):
        raise OutputError(
            f"cannot write {target}: " + ("it is a folder" if path.is_dir() else "no such folder")
        )


def write_json(value: Any, target: str | None) -> None:
    """Write figures to a file, or to the standard output for `-`; see `finite` for what JSON cannot say.

    Raises:
        OutputError: the file cannot be written.
    """
    if target is None:
        return
    from awq.pipeline.report import finite

    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n", "utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


def quiet_libraries() -> None:
    """Keep progress bars and notices of the libraries out of our output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def load_model(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    exact: bool = False,
    kernel: str | None = None,
    head_bits: int | None = None,
    fuse: bool = False,
) -> Any:
    """A float or a quantized model, in eval mode.

    Args:
        model: a folder, or a hub name.
        dtype: one of `DTYPES`.
        device: as `awq.model.pick_device` takes it.
        trust_remote_code: run modelling code that comes with the model.
        exact: dequantize in the activations' dtype instead of using a fast kernel, for figures.
        kernel: insist on this one.
        head_bits: of the output head of a quantized model; as it was saved by default.
        fuse: of a quantized model; see `awq.hf.fuse`.

    Raises:
        AwqError: the model cannot be loaded.
    """
    import torch

    from awq.hf import load_float, load_quantized
    from awq.hf.fuse import fuse as fuse_layers
    from awq.hf.load import holds_codes
    from awq.model import pick_device
    from awq.model.fetch import resolve

    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    folder, place = resolve(model), pick_device(device)
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    if head_bits is not None and place.type != "cpu":
        raise ConfigError(
            f"a head of {head_bits} bits is faster on CPUs only: leave --head-bits out on {place}"
        )
    if holds_codes(folder):
        options: dict[str, Any] = {"kernel": "torch" if exact else kernel, "head_bits": head_bits}
        loaded = load_quantized(folder, dtype=wanted, trust_remote_code=trust_remote_code, **options)
        if place.type != "cpu":
            loaded = loaded.to(place)
        if fuse:
            fuse_layers(loaded)
        return loaded
    return load_float(folder, dtype=wanted, trust_remote_code=trust_remote_code).to(place)


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model.

    Raises:
        LoadError: there is none that can be loaded.
    """
    from awq.model import fetch

    return fetch.load_tokenizer(fetch.resolve(model), trust_remote_code)

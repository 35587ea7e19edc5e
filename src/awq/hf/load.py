"""Load a quantized checkpoint, or say exactly why not."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from awq.errors import AwqError, ConfigError, LoadError
from awq.formats.detect import detect, method_of
from awq.hf.differences import told
from awq.hf.fuse import fuse as fuse_layers
from awq.hf.head import check_head_bits, quantize_head
from awq.hf.placement import check_memory
from awq.hf.registration import register
from awq.kernels import kernel_choices
from awq.model.classes import auto_class
from awq.model.fetch import resolve
from awq.model.quantized import QuantizedCheckpoint, quantization_entry
from awq.model.weights import CheckpointReader, read_json


def is_awq(folder: Path) -> bool:
    """Whether a model folder says that it holds AWQ codes."""
    return method_of(_entry(folder)) == "awq"


def holds_codes(folder: Path) -> bool:
    """Whether a model folder says that it holds codes that `load_quantized` reads."""
    try:
        detect(_entry(folder))
    except ConfigError:
        return is_awq(folder)  # with what is wrong about it to be told
    return True


def load_quantized(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    max_memory: Any = None,
    trust_remote_code: bool = False,
    kernel: str | None = None,
    fuse: bool = False,
    max_seq_len: int | None = None,
    head_bits: int | None = None,
    **kwargs: Any,
) -> Any:
    """Load an AWQ checkpoint as a transformers model in eval mode.

    Codes of GPTQ, compressed-tensors and MLX are loaded too where they map exactly (whole zero points, no
    act-order); `awq convert` does the same once and for all.

    Args:
        path: a folder, or a hub name.
        dtype: of activations and float weights; the checkpoint's own by default.
        device_map, max_memory: as transformers takes them; limits without a map ask for `auto`.
        trust_remote_code: run modelling code that comes with the model.
        kernel: insist on a kernel; the fastest that fits by default.
        fuse: merge layers that read the same tensor, such as q/k/v and gate/up, into one product.
        max_seq_len: with `fuse`, tokens that a static key/value cache holds; None for one that grows.
        head_bits: 8 rounds the output head, where one of our kernels for CPUs serves it; by default it is
            kept as it was saved. A model with a rounded head cannot be saved or dequantized.
        **kwargs: further arguments of `from_pretrained`.

    Raises:
        ConfigError: the folder holds no quantized checkpoint, or one that has no exact form here; a map or
            limit cannot work; there is no head of so many bits.
        MissingFileError, CorruptFileError: files are missing or damaged.
        LoadError: a tensor is missing, unexpected or of another shape. Nothing is ever initialised at random.
    """
    check_head_bits(head_bits)
    folder = resolve(path)
    check_memory(max_memory)
    if max_memory is not None and device_map is None:
        device_map = "auto"
    if not is_awq(folder):
        options = {"dtype": dtype, "device_map": device_map, "max_memory": max_memory, "kernel": kernel}
        options |= {"fuse": fuse, "max_seq_len": max_seq_len, "trust_remote_code": trust_remote_code}
        options |= {"head_bits": head_bits}
        return _load_foreign(folder, **options, **kwargs)
    if kernel is not None and kernel not in kernel_choices():
        raise ConfigError(f"kernel {kernel!r} is unknown; known are: {', '.join(kernel_choices())}")
    reader = CheckpointReader(folder)  # raises on missing and damaged files
    register()
    optional = {"max_memory": max_memory} if max_memory is not None else {}
    # Codes are buffers, which accelerate would keep in memory otherwise.
    kwargs.setdefault("offload_buffers", True)
    try:
        auto_class, config = _class_and_config(folder, trust_remote_code, kernel)
        model, info = auto_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with everything else
            **optional,
            **kwargs,
        )
    except AwqError:
        raise
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise LoadError(f"transformers cannot load {folder}: {error}") from error
    _raise_on_differences(folder, info, reader.unused)
    model.eval()
    if head_bits is not None:
        quantize_head(model, kernel)
    if fuse:
        fuse_layers(model, max_seq_len)
    return model


def _load_foreign(folder: Path, **options: Any) -> Any:
    """Load GPTQ, compressed-tensors or MLX codes, by way of a temporary folder in the GEMM layout, or with a
    byte for each code where that has no such width, or several.

    transformers has quantizers of its own for these, which want other packages; the codes are the same.
    """
    from awq.pipeline.convert import convert

    if not _entry(folder):
        raise ConfigError(f"{folder} holds no AWQ checkpoint; quantize it first, or load it as a float model")
    device_map = options.get("device_map")
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise ConfigError(
            f"{folder} is in a layout that is converted while it is loaded, and cannot stay on disk: convert "
            "it first (awq convert FOLDER OUT --to gemm, or --to codes), and load the result"
        )
    with tempfile.TemporaryDirectory(prefix="awq-load-", ignore_cleanup_errors=True) as temporary:
        converted = Path(temporary) / "converted"
        convert(folder, converted, _layout_for(folder))
        return load_quantized(converted, **options)


def _layout_for(folder: Path) -> str:
    """The layout through which a checkpoint is loaded."""
    checkpoint = QuantizedCheckpoint(folder)
    kinds = {(layer.bits, layer.shape.group_size) for layer in checkpoint.layers.values()}
    # A group as long as the row has as many sizes as rows have lengths.
    mixed = len(kinds) > 1 and checkpoint.detected.group_size != -1
    return "codes" if mixed or any(bits != 4 for bits, _ in kinds) else "gemm"


def _entry(folder: Path) -> dict[str, Any]:
    return dict(quantization_entry(folder, read_json(folder / "config.json")) or {})


def _class_and_config(folder: Path, trust_remote_code: bool, kernel: str | None) -> tuple[Any, Any]:
    """The class of transformers that makes a generating model of this folder, and its configuration."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    backend = {"backend": kernel} if kernel else {}
    config.quantization_config = {"quant_method": "awq", **_entry(folder), **backend}
    return auto_class(config, trust_remote_code), config


def _raise_on_differences(folder: Path, info: dict[str, Any], unused: set[str]) -> None:
    problems = []
    for title, key in (
        ("missing", "missing_keys"),
        ("unexpected", "unexpected_keys"),
        ("mismatched", "mismatched_keys"),
    ):
        found = {name if isinstance(name, str) else str(name[0]) for name in info.get(key) or ()}
        problems.append(told(title, found - unused if key == "unexpected_keys" else found))
    problems += [str(message) for message in info.get("error_msgs") or ()]
    if any(problems):
        raise LoadError(f"{folder} does not fit its model: {'; '.join(filter(None, problems))}")

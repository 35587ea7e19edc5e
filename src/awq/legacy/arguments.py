"""AutoAWQ's arguments, read: those that decide nothing here are answered once a process, with the reason."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from awq.config import QuantConfig
from awq.errors import ConfigError
from awq.formats.detect import AWQ_VERSIONS
from awq.model.weights import CheckpointReader

NO_EFFECT = {
    "low_cpu_mem_usage": "only one block is in memory while quantizing, and transformers loads the same way",
    "max_chunk_memory": "the statistics take the memory of one matrix, whatever the number of tokens",
    "max_seq_len": (
        "the key/value cache grows as it is needed, unless fuse_layers=True asks for a static one; "
        "max_new_tokens of generate() sets a limit"
    ),
    "batch_size": "the key/value cache is made for the sequences that generate() is given",
    "use_exllama": "the kernel is chosen by device and shape",
    "use_exllama_v2": "the kernel is chosen by device and shape",
    "use_ipex": "the kernel is chosen by device and shape",
    "use_qbits": "the kernel is chosen by device and shape",
    "max_new_tokens": "it sets no size when loading; give it to generate()",
    "version='exllama'": "it names a kernel, and its checkpoints are in the gemm layout, which is written",
    "version='ipex'": "it names a kernel, and its checkpoints are in the gemm layout, which is written",
    "model_type": "it is read from the model's config.json",
    "safetensors": "safetensors are read and written in any case: pickled weights can run code when opened",
    "init_quant": (
        "inputs with images are calibration data as they are, and need no quantizer that catches them"
    ),
    "subclass": (
        "the hooks of a class derived from BaseAWQForCausalLM are not called: layers and scaling groups are "
        "discovered, and each fold is proved"
    ),
}

_answered: set[str] = set()


def answer(given: Mapping[str, Any]) -> None:
    """Warn of each argument in `given` that was asked for something it does not do.

    The warning points at the first caller outside this package.

    Args:
        given: by name, whether it was asked for.
    """
    for name, asked in given.items():
        if asked and name not in _answered:
            _answered.add(name)
            warnings.warn(f"{name} has no effect: {NO_EFFECT[name]}", stacklevel=_outside())


def _outside() -> int:
    """How many frames above `answer` the first one outside this package is, as `warnings.warn` counts."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "awq":
        frame = frame.f_back
        level += 1
    return level


def read_settings(given: Mapping[str, Any] | QuantConfig | None, skipped: Any) -> dict[str, Any]:
    """The configuration as a dictionary, with the layers named in the call added to its own."""
    out = given.to_dict() if isinstance(given, QuantConfig) else dict(given or {})
    if skipped:
        out["modules_to_not_convert"] = [*(out.get("modules_to_not_convert") or ()), *skipped]
    return out


def take_version(settings: dict[str, Any]) -> str:
    """Take the layout out of AutoAWQ's dictionary (`version`, as any reader spells it) or ours (`format`).

    Raises:
        ConfigError: the layout cannot hold zero points, and they are not given up.
    """
    version = str(settings.pop("version", None) or settings.pop("format", None) or "gemm").lower()
    settings.pop("format", None)
    answer({f"version={version!r}": version in ("exllama", "ipex")})
    layout = AWQ_VERSIONS.get(version, version)
    if layout == "marlin" and settings.get("zero_point", True):
        raise ConfigError(
            "version='marlin' holds symmetric codes alone, and no engine reads it with zero points: write "
            "`gemm`, which engines (and OpenAWQ) arrange for their kernels when they load it, or set "
            "zero_point=False"
        )
    return layout


# What AutoAWQ's examples override, to catch what the first block is given for inputs with images.
_CATCHING = "init_quant"


class AwqQuantizer:
    """AutoAWQ's search, as a class to derive from. It can be named, and not used."""

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(
            f"{type(self).__name__}: there is no quantizer object to make or to derive from; "
            "awq.quantize(model, out, config, calib) does the work, calib_data takes texts, token ids, chats "
            "and a processor's inputs, and the steps of the search are functions in awq.search"
        )


def check_quantizer(quantizer_cls: Any) -> None:
    """Accept AutoAWQ's own class, and a derived one that only catches inputs with images (its `init_quant`),
    which is not needed for that; anything else would do something else than what is done.

    Raises:
        ConfigError: for any other.
    """
    if quantizer_cls in (None, AwqQuantizer):
        return
    own = _own_members(quantizer_cls)
    if own is not None and own <= {_CATCHING}:
        answer({_CATCHING: bool(own)})
        return
    raise ConfigError(
        f"quantizer_cls={getattr(quantizer_cls, '__name__', quantizer_cls)!r}: the search cannot be "
        "replaced by a class derived from AwqQuantizer; calib_data takes texts, token ids, chats and a "
        "processor's inputs, and the steps of the search are functions in awq.search"
    )


def _own_members(derived: Any) -> set[str] | None:
    """What a class derived from `AwqQuantizer` defines itself; None for anything else."""
    if not (isinstance(derived, type) and issubclass(derived, AwqQuantizer)):
        return None
    above = derived.__mro__[: derived.__mro__.index(AwqQuantizer)]
    names = {name for cls in above for name in vars(cls)}
    return {name for name in names if not name.startswith("__") or name == "__init__"}


def check_filename(folder: Path, name: str) -> None:
    """Accept the name of the one weight file there is; any other would load something else than was asked.

    Raises:
        ConfigError: for any other.
    """
    files = CheckpointReader(folder).files
    if name and files != [name]:
        raise ConfigError(
            f"quant_filename={name!r}: the safetensors files of {folder} are read as a whole "
            f"({', '.join(files)}); leave it out"
        )

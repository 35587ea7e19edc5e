"""From what a model folder says about its quantization to a layout, or to a sentence that says why not.

Every project writes it differently: transformers' `quantization_config` (with `quant_method` awq, gptq or
compressed-tensors), MLX's `quantization`, and beside `config.json` the `quant_config.json` of AutoAWQ and
llm-awq and the `quantize_config.json` of AutoGPTQ, in their first years.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from awq.config import FORMAT_BITS, Setting
from awq.errors import ConfigError

# AutoAWQ's versions. Its exllama and ipex ones name a kernel: on disk they are GEMM.
AWQ_VERSIONS = {
    "gemm": "gemm",
    "exllama": "gemm",
    "ipex": "gemm",
    "gemv": "gemv",
    "gemv_fast": "gemv_fast",
    "gemvfast": "gemv_fast",
    "gemv-fast": "gemv_fast",
    "llm-awq": "llm_awq",
    "marlin": "marlin",
    "codes": "codes",
}
# Widths that are read, where the layout holds more than 4 bits.
_WIDTHS = FORMAT_BITS | {"codes": tuple(range(2, 9))}
_REQUANTIZE = "start from the original weights instead"


@dataclasses.dataclass(frozen=True)
class Detected:
    """How a checkpoint is quantized.

    Args:
        layout: a name in `LAYOUTS`.
        bits: width of a code.
        group_size: input channels that share a scale; -1 for the whole row.
        skipped: layers that the configuration says are float.
        exceptions: where they differ, by the layer's name; one that begins with `re:` is a pattern.
        symmetric: the configuration says that every zero point is the middle code.
    """

    layout: str
    bits: int
    group_size: int
    skipped: tuple[str, ...] = ()
    exceptions: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    symmetric: bool = False

    def setting(self, name: str) -> Setting:
        """Width and group size of a layer."""
        if name in self.exceptions:
            return self.exceptions[name]
        for pattern, setting in self.exceptions.items():
            if pattern.startswith("re:") and re.match(pattern.removeprefix("re:"), name):
                return setting
        return Setting(self.bits, self.group_size)


def entry_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of `config.json` that speaks of quantization, or None; MLX's gets `quant_method: mlx`."""
    for place in (config, config.get("text_config") or {}):
        mlx = place.get("quantization")
        if isinstance(mlx, Mapping) and "group_size" in mlx:
            return {**mlx, "quant_method": "mlx"}
        entry = place.get("quantization_config")
        if isinstance(entry, Mapping) and entry:
            return entry
    return None


def detect(entry: Mapping[str, Any], suffixes: Collection[str] = ()) -> Detected:
    """What a configuration entry means.

    Args:
        entry: as `entry_of` gives it, or the contents of an older project's own file.
        suffixes: last parts of the checkpoint's tensor names, which tell llm-awq's layout from AutoAWQ's.

    Raises:
        ConfigError: the method, the version or the width is not served; with the cure.
    """
    method = method_of(entry)
    readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors, "mlx": _mlx}
    if method not in readers:
        raise ConfigError(
            f"quant_method {method!r} cannot be read; {', '.join(readers)} can. For this one, {_REQUANTIZE}"
        )
    found = readers[method](entry)
    if found.layout == "gemv_fast" and "scaled_zeros" in suffixes:
        return dataclasses.replace(found, layout="llm_awq")
    return found


def method_of(entry: Mapping[str, Any]) -> str | None:
    """The method that an entry names, or that an older project's own file implies by the names it uses."""
    if entry.get("quant_method"):
        return str(entry["quant_method"])
    if "w_bit" in entry or "q_group_size" in entry:
        return "awq"
    return "gptq" if "desc_act" in entry and "bits" in entry else None


def _awq(entry: Mapping[str, Any]) -> Detected:
    version = str(
        entry.get("version") or entry.get("checkpoint_format") or entry.get("format") or "gemm"
    ).lower()
    if version not in AWQ_VERSIONS:
        raise ConfigError(
            f"AWQ version {version!r} is unknown; known are: {', '.join(AWQ_VERSIONS)}. Correct `version` "
            "in the checkpoint's configuration if its tensors are in one of these"
        )
    layout = AWQ_VERSIONS[version]
    if entry.get("zero_point", True) is False and layout != "marlin":
        raise ConfigError(
            f"zero_point: false has no meaning in the {layout} layout, whose tensors include zero points; "
            f"{_REQUANTIZE}"
        )
    size = _whole(entry, "group_size", "q_group_size", 128)
    return Detected(
        layout,
        _held(_whole(entry, "bits", "w_bit", 4), layout),
        size,
        tuple(entry.get("modules_to_not_convert") or ()),
        {name: Setting(*setting) for name, setting in (entry.get("layers") or {}).items()},
        layout == "marlin",
    )


def _gptq(entry: Mapping[str, Any]) -> Detected:
    version = str(entry.get("checkpoint_format") or entry.get("format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2"):
        raise ConfigError(
            f"GPTQ checkpoint format {version!r} cannot be read; gptq and gptq_v2 can. Save it as gptq with "
            f"GPTQModel, or {_REQUANTIZE}"
        )
    if entry.get("pack_dtype") not in (None, "int32", "torch.int32"):
        raise ConfigError(f"GPTQ words of {entry['pack_dtype']} cannot be read, only int32; {_REQUANTIZE}")
    return Detected(
        version,
        _held(_whole(entry, "bits", "bits", 4), version),
        _whole(entry, "group_size", "group_size", 128),
        symmetric=entry.get("sym") is True,
    )


def _compressed_tensors(entry: Mapping[str, Any]) -> Detected:
    name = "compressed-tensors"
    groups = list((entry.get("config_groups") or {}).values())
    formats = {entry.get("format")} | {group.get("format") for group in groups} - {None}
    if formats != {"pack-quantized"}:
        found = ", ".join(sorted(str(value) for value in formats - {"pack-quantized"}))
        raise ConfigError(f"{name} format {found} cannot be read, only pack-quantized; {_REQUANTIZE}")
    if not groups:
        raise ConfigError(f"the {name} configuration has no config_groups")
    settings: dict[str, Setting] = {}
    for group in groups:
        weights = group.get("weights") or {}
        if group.get("input_activations"):
            raise ConfigError(f"{name} with quantized activations cannot be read; {_REQUANTIZE}")
        if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
            raise ConfigError(
                f"{name} weights of type {weights.get('type')} by {weights.get('strategy')} cannot be read, "
                f"only int by group or channel; {_REQUANTIZE}"
            )
        size = weights["group_size"] if weights["strategy"] == "group" else -1
        setting = Setting(_held(weights.get("num_bits"), name), size)
        settings |= dict.fromkeys(group.get("targets") or ["Linear"], setting)
    # The class of all linear layers; where there are several groups, layers are told apart by name.
    most = settings.pop("Linear", None) or next(iter(settings.values()))
    skipped = tuple(name for name in entry.get("ignore") or () if not name.startswith("re:"))
    symmetric = all((group.get("weights") or {}).get("symmetric") is True for group in groups)
    return Detected(name, *most, skipped, {k: v for k, v in settings.items() if v != most}, symmetric)


def _mlx(entry: Mapping[str, Any]) -> Detected:
    mode = entry.get("mode", "affine")
    if mode != "affine":
        raise ConfigError(f"MLX mode {mode!r} cannot be read, only affine; {_REQUANTIZE}")
    bits, size = _whole(entry, "bits", "bits", 4), _whole(entry, "group_size", "group_size", 64)
    exceptions: dict[str, Setting] = {}
    skipped = []
    for layer, value in entry.items():
        if isinstance(value, Mapping):
            if value.get("mode", "affine") != "affine":
                raise ConfigError(f"{layer} is in MLX mode {value['mode']!r}; only affine can be read")
            exceptions[layer] = Setting(
                _whole(value, "bits", "bits", bits),
                _whole(value, "group_size", "group_size", size),
            )
        elif value is False:
            skipped.append(layer)
    return Detected("mlx", bits, size, tuple(skipped), exceptions)


def _whole(entry: Mapping[str, Any], name: str, old_name: str, default: int) -> int:
    value = entry.get(name, entry.get(old_name, default))
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number in the checkpoint's configuration, not {value!r}")
    return value


def _held(bits: Any, layout: str) -> int:
    """A width, if the layout has it."""
    widths = _WIDTHS.get(layout, (4,))
    if bits not in widths:
        raise ConfigError(
            f"{layout} checkpoints of {bits} bits cannot be read, only those of "
            f"{', '.join(map(str, widths))}; {_REQUANTIZE}"
        )
    return int(bits)

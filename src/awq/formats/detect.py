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

from awq.errors import ConfigError

# AutoAWQ's versions. Its exllama and ipex ones name a kernel: on disk they are GEMM.
_AWQ_VERSIONS = {
    "gemm": "gemm",
    "exllama": "gemm",
    "ipex": "gemm",
    "gemv": "gemv",
    "gemv_fast": "gemv_fast",
    "gemvfast": "gemv_fast",
    "gemv-fast": "gemv_fast",
    "llm-awq": "llm_awq",
    "marlin": "marlin",
}
_REQUANTIZE = "start from the original weights instead"


@dataclasses.dataclass(frozen=True)
class Detected:
    """How a checkpoint is quantized.

    Args:
        layout: a name in `LAYOUTS`.
        bits: width of a code.
        group_size: input channels that share a scale; -1 for the whole row.
        skipped: layers that the configuration says are float.
        exceptions: `{layer: (bits, group_size)}` where they differ (MLX).
    """

    layout: str
    bits: int
    group_size: int
    skipped: tuple[str, ...] = ()
    exceptions: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


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
    if version not in _AWQ_VERSIONS:
        raise ConfigError(
            f"AWQ version {version!r} is unknown; known are: {', '.join(_AWQ_VERSIONS)}. Correct `version` "
            "in the checkpoint's configuration if its tensors are in one of these"
        )
    layout = _AWQ_VERSIONS[version]
    if entry.get("zero_point", True) is False and layout != "marlin":
        raise ConfigError(
            f"zero_point: false has no meaning in the {layout} layout, whose tensors include zero points; "
            f"{_REQUANTIZE}"
        )
    bits = _whole(entry, "bits", "w_bit", 4)
    return Detected(
        layout,
        _only_four(bits, layout),
        _whole(entry, "group_size", "q_group_size", 128),
        tuple(entry.get("modules_to_not_convert") or ()),
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
        _only_four(_whole(entry, "bits", "bits", 4), version),
        _whole(entry, "group_size", "group_size", 128),
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
    sizes = set()
    for group in groups:
        weights = group.get("weights") or {}
        if group.get("input_activations"):
            raise ConfigError(f"{name} with quantized activations cannot be read; {_REQUANTIZE}")
        if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
            raise ConfigError(
                f"{name} weights of type {weights.get('type')} by {weights.get('strategy')} cannot be read, "
                f"only int by group or channel; {_REQUANTIZE}"
            )
        _only_four(weights.get("num_bits"), name)
        sizes.add(weights["group_size"] if weights["strategy"] == "group" else -1)
    if len(sizes) > 1:
        raise ConfigError(f"{name} with several group sizes ({sorted(sizes)}) cannot be read; {_REQUANTIZE}")
    skipped = tuple(name for name in entry.get("ignore") or () if not name.startswith("re:"))
    return Detected(name, 4, sizes.pop(), skipped)


def _mlx(entry: Mapping[str, Any]) -> Detected:
    mode = entry.get("mode", "affine")
    if mode != "affine":
        raise ConfigError(f"MLX mode {mode!r} cannot be read, only affine; {_REQUANTIZE}")
    bits, size = _whole(entry, "bits", "bits", 4), _whole(entry, "group_size", "group_size", 64)
    exceptions: dict[str, tuple[int, int]] = {}
    skipped = []
    for layer, value in entry.items():
        if isinstance(value, Mapping):
            if value.get("mode", "affine") != "affine":
                raise ConfigError(f"{layer} is in MLX mode {value['mode']!r}; only affine can be read")
            exceptions[layer] = (
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


def _only_four(bits: Any, layout: str) -> int:
    if bits != 4:
        raise ConfigError(
            f"{layout} checkpoints of {bits} bits cannot be read, only those of 4; {_REQUANTIZE}"
        )
    return 4


def entry_for(
    layout: str,
    bits: int,
    group_size: int,
    skipped: list[str],
    quantized_head: bool = False,
    symmetric: bool = False,
) -> dict[str, Any]:
    """What `config.json` must say about a checkpoint in a layout: `{key: value}`, empty for plain weights.

    Args:
        layout: a name in `LAYOUTS`.
        bits: width of a code.
        group_size: -1 for the whole row.
        skipped: full paths of every linear layer left float.
        quantized_head: the output head holds codes too.
        symmetric: every zero point is the middle code. Engines whose GPTQ kernels know nothing else refuse a
            checkpoint that does not say so.
    """
    if layout == "float":
        return {}
    if layout == "mlx":
        return {"quantization": {"group_size": group_size, "bits": bits, "mode": "affine"}}
    if layout == "compressed-tensors":
        return {"quantization_config": _compressed_entry(group_size, skipped, quantized_head)}
    if layout in ("gptq", "gptq_v2"):
        # The head is never quantized unless `lm_head` says so, and needs no mention.
        floats = [name for name in skipped if name != "lm_head"]
        entry: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": False,
            "sym": symmetric,
            "lm_head": quantized_head,
            "checkpoint_format": layout,
        }
        if floats:
            entry["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in floats}
        return {"quantization_config": entry}
    entry = {
        "quant_method": "awq",
        "bits": bits,
        "group_size": group_size,
        "zero_point": layout != "marlin",
        "version": "gemv_fast" if layout == "llm_awq" else layout,
        "modules_to_not_convert": skipped,
    }
    if layout == "llm_awq":
        entry["backend"] = "llm-awq"
    if quantized_head:
        entry["lm_head"] = True
    return {"quantization_config": entry}


def _compressed_entry(group_size: int, skipped: list[str], quantized_head: bool) -> dict[str, Any]:
    by_row = group_size == -1
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "channel" if by_row else "group",
        "group_size": None if by_row else group_size,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "actorder": None,
        "block_structure": None,
    }
    # A tied head has no tensor of its own, and is a linear layer all the same.
    ignore = skipped if quantized_head or "lm_head" in skipped else [*skipped, "lm_head"]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }

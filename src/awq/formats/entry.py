"""What `config.json` must say about a checkpoint, in the words of the project whose layout it is in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from awq.config import Setting

# Layouts whose configuration can name several widths and group sizes.
MIXING = ("compressed-tensors", "mlx", "codes")
# Layouts whose readers would turn the layers of a GPT-2 as they turn its float weights.
NO_CONV1D = ("compressed-tensors", "mlx")
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def entry_for(
    layout: str,
    bits: int,
    group_size: int,
    skipped: list[str],
    quantized_head: bool = False,
    symmetric: bool = False,
    layers: Mapping[str, Setting] | None = None,
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
        layers: for a layout among `MIXING`, what each quantized layer has, if not all have the same.
    """
    others = {name: it for name, it in (layers or {}).items() if it != (bits, group_size)}
    if layout == "float":
        return {}
    if layout == "mlx":
        each: dict[str, Any] = {
            name: {"group_size": it.group_size, "bits": it.bits} for name, it in others.items()
        }
        return {"quantization": {"group_size": group_size, "bits": bits, "mode": "affine"} | each}
    if layout == "compressed-tensors":
        targets = _targets(layers or {}) if others else {Setting(bits, group_size): ["Linear"]}
        return {"quantization_config": _compressed_entry(targets, skipped, quantized_head, symmetric)}
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
    if others:
        entry["layers"] = {name: list(setting) for name, setting in others.items()}
    return {"quantization_config": entry}


def _targets(layers: Mapping[str, Setting]) -> dict[Setting, list[str]]:
    """Layers by what they have; the experts of a layer, which are all alike, in one pattern.

    The class `Linear` must not be among them: engines that fuse layers look for classes before they take a
    fused layer apart.
    """
    out: dict[Setting, dict[str, None]] = {}
    for name, setting in layers.items():
        expert = _EXPERT.match(name)
        target = f"re:^{re.escape(expert[1])}\\.\\d+\\." if expert else name
        out.setdefault(setting, {})[target] = None
    return {setting: list(targets) for setting, targets in out.items()}


def _compressed_entry(
    targets: Mapping[Setting, list[str]], skipped: list[str], quantized_head: bool, symmetric: bool
) -> dict[str, Any]:
    # A tied head has no tensor of its own, and is a linear layer all the same.
    ignore = skipped if quantized_head or "lm_head" in skipped else [*skipped, "lm_head"]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": names,
                "weights": _compressed_weights(setting, symmetric),
                "input_activations": None,
                "output_activations": None,
            }
            for number, (setting, names) in enumerate(targets.items())
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _compressed_weights(setting: Setting, symmetric: bool) -> dict[str, Any]:
    by_row = setting.group_size == -1
    return {
        "num_bits": setting.bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if by_row else "group",
        "group_size": None if by_row else setting.group_size,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "actorder": None,
        "block_structure": None,
    }

"""Quantized checkpoints of tiny models, made by plain rounding, and the float model they stand for.

The pipeline does not quantize every architecture; a loader must be tested on those that it does not, too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from awq.formats import get_format
from awq.weight import QuantizedWeight

GROUP = 32
# What checkpoints keep as float.
FLOAT = re.compile(
    r"embed|norm|lm_head|wte|wpe|visual|vision|shared_expert_gate|kv_a_proj_with_mqa|router|score"
)


def round_to_codes(
    weight: Tensor,
    group: int = GROUP,
    scales_dtype: torch.dtype = torch.float16,
    symmetric: bool = False,
) -> QuantizedWeight:
    """4-bit codes of a float weight `[out, in]`; symmetric ones have 8 for every zero point."""
    grouped = weight.float().view(weight.shape[0], -1, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    span = grouped.abs().amax(-1) * 15 / 7 if symmetric else high - low
    scales = (span / 15).clamp(min=1e-5).to(scales_dtype)
    zeros = torch.full_like(low, 8) if symmetric else (-low / scales.float()).round().clamp(0, 15)
    codes = (grouped / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    codes = codes.clamp(0, 15).view(weight.shape).to(torch.uint8)
    return QuantizedWeight(codes, scales, zeros.to(torch.uint8))


def quantized_pair(
    model: Any,
    folder: Path,
    keep: re.Pattern[str] = FLOAT,
    entry: dict[str, Any] | None = None,
    scales_dtype: torch.dtype = torch.float16,
    group: int = GROUP,
    layout: str = "gemm",
) -> tuple[Path, Path]:
    """Write `folder/awq`, a quantized checkpoint, and `folder/float`, its weights dequantized to float32.

    Args:
        model: a tiny model.
        folder: where both go.
        keep: names of tensors to leave alone.
        entry: changes to `quantization_config`; a value of None takes a field away.
        scales_dtype: of the scales.
        group: channels that share a scale.
        layout: a name in `awq.formats`.
    """
    plain, quantized = folder / "float", folder / "awq"
    model.save_pretrained(plain)
    model.save_pretrained(quantized)
    tensors = load_file(plain / "model.safetensors")
    packed: dict[str, Tensor] = {}
    for name, tensor in list(tensors.items()):
        fits = tensor.dim() == 2 and tensor.shape[0] % 8 == 0 and tensor.shape[1] % group == 0
        if not fits or keep.search(name) or not name.endswith(".weight"):
            packed[name] = tensor
            continue
        weight = round_to_codes(tensor, group, scales_dtype, symmetric=layout == "marlin")
        tensors[name] = weight.dequantize()
        stem = name.removesuffix(".weight")
        packed |= {f"{stem}.{suffix}": value for suffix, value in get_format(layout).pack(weight).items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    save_file(packed, quantized / "model.safetensors", {"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    fields = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    fields |= {"modules_to_not_convert": ["lm_head"]} | (entry or {})
    config["quantization_config"] = {k: v for k, v in fields.items() if v is not None}
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, plain


def prompt(rows: int = 2, length: int = 9) -> Tensor:
    """Token ids of a tiny model."""
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(7))


def relative(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((value - reference).abs().max() / reference.abs().max())


def same_files(first: Path, second: Path) -> None:
    """Assert that two checkpoints hold the same tensors under the same names."""
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name

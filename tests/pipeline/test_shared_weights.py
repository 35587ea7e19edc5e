"""Weights that several blocks use: changed for one, they would be wrong for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import awq
from awq.hf import load_float, load_quantized

# Zamba 2: the second and the last block hold the same transformer, the fourth one of its own.
_ZAMBA = {
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "hybrid"] * 3,
    "hybrid_layer_ids": [1, 3, 5],
    "num_mem_blocks": 2,
    "mamba_d_state": 16,
    "mamba_headdim": 32,
    "n_mamba_heads": 4,
    "chunk_size": 16,
    "attention_head_dim": 32,
    "adapter_rank": 8,
}
_IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(
    transformers.__version__.startswith("5.16."),
    reason="transformers 5.16 ties the adapters of a Zamba 2 that it loads to layers of other shapes",
)
@torch.no_grad()
def test_shared_weights_stay_as_they_are_for_all_blocks(tiny: Any, tmp_path: Path) -> None:
    tiny("zamba2", **_ZAMBA).save_pretrained(tmp_path / "model")
    expected = load_float(tmp_path / "model", dtype=torch.float32)(_IDS).logits
    calib = _IDS.tolist()
    config: dict[str, Any] = {"group_size": 32, "scale_steps": 4, "clip": False}
    folded = awq.QuantConfig(**config, format="folded")
    report = awq.quantize(tmp_path / "model", tmp_path / "folded", folded, calib)
    logits = load_float(tmp_path / "folded", dtype=torch.float32)(_IDS).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4
    reasons = {name: reason for name, reason in report.plan.skipped.items() if "shared_transformer" in name}
    assert set(reasons.values()) >= {"other blocks share its weights"}
    assert not any(".layers.1.shared" in name or ".layers.5.shared" in name for name in report.plan.quantized)
    assert any(".layers.3.shared" in name for name in report.plan.quantized)
    awq.quantize(tmp_path / "model", tmp_path / "out", awq.QuantConfig(**config), calib)
    quantized = load_quantized(tmp_path / "out", dtype=torch.float32)(_IDS).logits
    assert bool(torch.isfinite(quantized).all())

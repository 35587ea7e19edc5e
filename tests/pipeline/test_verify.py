"""The verdict at the end of a run: the figures are those of whole models, and damage on disk is seen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from awq import QuantConfig
from awq.evaluate import compare
from awq.hf import load_float, load_quantized
from awq.pipeline import quantize

QUICK = QuantConfig(group_size=32, scale_steps=3, rounding="nearest")
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_SHARED = {
    "num_key_value_heads": 2, "head_dim": 16, "num_kv_shared_layers": 1, "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16, "laurel_rank": 8, "num_hidden_layers": 3, "intermediate_size": 128,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "activation_sparsity_pattern": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "a head of its own": ("llama", _GROUPED),
    "a tied head": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "a capped head": ("gemma2", {**_GROUPED, "head_dim": 16}),
    "masks of two kinds": ("gemma3_text", {**_GROUPED, "head_dim": 16}),
    "experts": ("qwen3_moe", {**_GROUPED, **_EXPERTS}),
    "fused experts": ("granitemoe", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "tuples": ("bloom", {}),
    "transposed weights": ("gpt2", {"n_inner": 128}),
    "a projection behind the blocks": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 32}),
    "states shared by blocks": ("gemma3n_text", _SHARED),
}


def saved(tiny: Any, folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    tiny(family, **changes).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tiny: Any, tmp_path: Path) -> Path:
    return saved(tiny, tmp_path / "model", "llama", num_key_value_heads=2)


def whole(model: Path, out: Path, ids: list[list[int]]) -> Any:
    """The same figures from models that are loaded whole."""
    ours = load_quantized(out, dtype=torch.float32, kernel="torch")
    return compare(
        ours, load_float(model, dtype=torch.float32), [torch.tensor(row) for row in ids], window=128
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_figures_are_those_of_models_loaded_whole(
    name: str, tiny: Any, tmp_path: Path, token_lists: Any
) -> None:
    family, changes = FAMILIES[name]
    model, out = saved(tiny, tmp_path / "model", family, **changes), tmp_path / "out"
    verdict = quantize(model, out, QUICK, token_lists).verdict
    assert verdict is not None
    expected = whole(model, out, token_lists)
    assert verdict.kl > 1e-4  # there is something to be wrong about
    for found, wanted in (
        (verdict.kl, expected.kl),
        (verdict.kl_stderr, expected.kl_stderr),
        (verdict.perplexity, expected.perplexity.value),
        (verdict.original_perplexity, expected.reference_perplexity.value),
        (verdict.rise, expected.rise),
    ):
        assert math.isclose(found, wanted, rel_tol=1e-3, abs_tol=1e-6), (found, wanted)
    assert verdict.top1 == pytest.approx(expected.top1, abs=0.01)
    assert verdict.tokens == expected.tokens

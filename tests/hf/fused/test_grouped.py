"""Attention of grouped queries over a static cache: the same tokens as transformers' own attention."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from awq.hf.fuse import fuse, unfuse
from awq.hf.fused import grouped
from rounded import prompt, quantized_pair

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_it_gives_what_the_attention_of_transformers_gives(tokens: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, tokens, 16, generator=generator)
    key, value = (torch.randn(2, 2, 24, 16, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, tokens, 24, generator=generator) < 0.7 if masked else None
    module = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    got, weights = grouped.attend(module, query, key, value, mask, scaling=0.3)
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.3)
    assert weights is None
    assert got.shape == (2, tokens, 8, 16)
    assert torch.allclose(got, expected, atol=1e-6)


@pytest.fixture
def model(tmp_path: Path, tiny: Any) -> Any:
    folder, _ = quantized_pair(tiny("llama", num_key_value_heads=2), tmp_path)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_fused_model_generates_the_same_with_it_and_unfusing_ends_it(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate(prompt(), **GREEDY)
    monkeypatch.setattr(grouped, "_gains", lambda model, length: True)  # as with cuDNN's kernel on a GPU
    fuse(model, 64)
    assert model.config._attn_implementation == grouped.NAME
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    unfuse(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)


def test_left_padded_rows_give_what_they_give_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_gains", lambda model, length: True)
    fuse(model, 64)
    ids = prompt(1, 9)
    alone = model.generate(ids, **GREEDY)
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 4:], alone)


def test_a_model_on_a_cpu_does_without(model: Any) -> None:
    fuse(model, 64)
    assert model.config._attn_implementation != grouped.NAME

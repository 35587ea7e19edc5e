"""Attention and norms of our own in a fused model on a CPU: the same tokens as transformers'."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from awq.hf.fuse import fuse, unfuse
from awq.hf.fused import attention, decoding
from awq.hf.fused.norms import NativeNorm
from awq.kernels import cpu_native
from rounded import prompt, quantized_pair, relative

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
# Family, sizes, norms that are replaced, and whether its tokens attend by our function.
FAMILIES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "llama": ({"num_key_value_heads": 2}, 5, True),
    "qwen3": ({"num_key_value_heads": 2, "head_dim": 32}, 9, True),
    "mistral": ({"num_key_value_heads": 2, "sliding_window": 6}, 5, True),
    "gemma2": ({"num_key_value_heads": 2, "head_dim": 32}, 9, False),  # caps its scores
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64}, 0, True),
}


pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture(autouse=True)
def _faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is taken for the faster attention, wherever the tests run; blocks have one of their own."""
    monkeypatch.setattr(attention, "pays", lambda: True)
    monkeypatch.setattr(decoding, "native_block", lambda *_: None)
    monkeypatch.setattr(decoding, "native_attention", lambda *_: None)


@pytest.fixture
def model(tmp_path: Path, tiny: Any) -> Any:
    folder, _ = quantized_pair(tiny("llama", num_key_value_heads=2), tmp_path)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def norms(model: Any) -> int:
    return sum(isinstance(module.__dict__.get("forward"), NativeNorm) for module in model.modules())


def uses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the caches that our attention was called for, as they come."""
    found: list[int] = []
    real = attention.attend_natively

    def attend(query: Any, key: Any, *rest: Any) -> Any:
        found.append(key.shape[2])
        return real(query, key, *rest)

    monkeypatch.setattr(attention, "attend_natively", attend)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_generates_the_same_tokens(
    family: str, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, count, attends = FAMILIES[family]
    folder, _ = quantized_pair(tiny(family, **sizes), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # the second row is padded on its left
    before = model.config._attn_implementation  # Gemma 2's is `sdpa` or not by transformers' release
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    fuse(model)
    assert norms(model) == count
    assert model.config._attn_implementation == (attention.NAME if before == "sdpa" else before)
    lengths = uses(monkeypatch)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    assert len(lengths) == (2 * 11 if attends else 0)  # two layers, all tokens but the first
    assert torch.equal(model.generate(ids[:1], **GREEDY), model.generate(ids[:1], **GREEDY, num_beams=1))
    unfuse(model)
    assert norms(model) == 0
    assert model.config._attn_implementation == before
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)


def test_where_pytorch_is_faster_attention_is_left_to_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    fuse(model)
    assert norms(model) == 5
    assert model.config._attn_implementation == "sdpa"


def test_a_static_cache_is_read_as_far_as_it_is_filled(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.generate(prompt(), **GREEDY)
    fuse(model, 64)
    lengths = uses(monkeypatch)
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert set(lengths) == {64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_sixteen_bits_are_as_near_to_float32_as_before(dtype: torch.dtype, tmp_path: Path, tiny: Any) -> None:
    folder, _ = quantized_pair(tiny("llama", num_key_value_heads=2), tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def off() -> float:
        past = model(prompt()[:, :-1], use_cache=True).past_key_values
        logits = model(prompt()[:, -1:], past_key_values=past).logits
        return relative(logits[:, -1].float(), exact(prompt()).logits[:, -1])

    before = off()
    fuse(model)
    assert off() < 1.5 * before


def test_what_it_does_not_serve_is_transformers_own() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 1, 16, generator=generator)
    key, value = (torch.randn(2, 2, 24, 16, generator=generator) for _ in range(2))
    module = SimpleNamespace(num_key_value_groups=4, is_causal=True)
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    bias = torch.randn(2, 1, 1, 24, generator=generator)
    long = torch.randn(2, 8, 24, 16, generator=generator)
    for queries, mask, options in (
        (query, None, {"scaling": 0.3}),
        (query, None, {}),
        (query, bias > 0, {"scaling": 0.3}),
        (query, bias, {"scaling": 0.3}),
        (query, None, {"position_bias": torch.randn(1, 8, 1, 24, generator=generator)}),
        (long, None, {"scaling": 0.3}),
        (query.double(), None, {"scaling": 0.3}),
    ):
        keys, values = key.to(queries.dtype), value.to(queries.dtype)
        got, weights = attention.attend(module, queries, keys, values, mask, **options)
        expected, _ = plain(module, queries, keys, values, mask, **options)
        assert weights is None
        torch.testing.assert_close(got, expected)


def test_gradients_flow_and_copies_work(model: Any) -> None:
    fuse(model)
    twin = copy.deepcopy(model)
    assert norms(twin) == norms(model) == 5
    assert torch.equal(twin.generate(prompt(), **GREEDY), model.generate(prompt(), **GREEDY))
    embedded = model.get_input_embeddings()(prompt()).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0
    assert model.model.norm.weight.grad.abs().sum() > 0


def test_a_model_whose_output_would_change_keeps_what_it_had(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate(prompt(), **GREEDY)
    monkeypatch.setattr(attention, "attend_natively", lambda query, *_: 1 + query.transpose(1, 2))
    with pytest.warns(UserWarning, match="stays transformers' own: its output changes by"):
        fuse(model)
    assert norms(model) == 0
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)


def test_without_the_library_nothing_is_replaced(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_native, "load", lambda: "there is no compiler")
    fuse(model)
    assert norms(model) == 0
    assert model.config._attn_implementation == "sdpa"

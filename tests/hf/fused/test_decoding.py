"""Decoder blocks in one call: found where they are what they should be, and the same tokens as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.llama import modeling_llama

from awq.hf.fuse import fuse, unfuse
from awq.hf.fused import decoding
from awq.hf.fused.decoding import NativeAttention, NativeBlock
from awq.hf.fused.room import RoomyLayer
from awq.kernels.cpu_block import CpuBlock
from moe_sizes import MOE
from rounded import prompt, quantized_pair, relative

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
# Family, sizes, what of its two blocks is replaced, and why not all if not all.
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "llama": (HEADS, "blocks", ""),
    "llama with biases": (HEADS | {"attention_bias": True, "mlp_bias": True}, "blocks", ""),
    "llama with scaled positions": (
        HEADS | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        "blocks",
        "",
    ),
    "qwen2": (HEADS, "blocks", ""),
    "qwen3": (HEADS, "blocks", ""),
    "mistral": (HEADS | {"sliding_window": None}, "blocks", ""),
    "mistral with a window": (HEADS | {"sliding_window": 13}, "blocks", ""),
    "gemma": (HEADS | {"hidden_activation": "gelu_pytorch_tanh"}, "blocks", ""),
    "granite": (HEADS | {"residual_multiplier": 0.5}, "attention", "what is added is multiplied"),
    "olmo2": (HEADS, "attention", "its norms are behind attention and gate"),
    "qwen3_moe": (HEADS | MOE | {"num_experts": 4}, "attention", "it has experts"),
    "gemma3_text": (HEADS | {"sliding_window": 6}, "attention", "it has four norms"),
    "ministral3": (HEADS, "", "queries are multiplied by their positions"),
    "phi3": (
        {"num_key_value_heads": 2, "pad_token_id": 0, "sliding_window": None},
        "attention",
        "one layer for gate and up",
    ),
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64}, "", "no gate, no rotation"),
    "stablelm": (HEADS, "", "a part of each head is turned"),
}


pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture
def model(tmp_path: Path, tiny: Any) -> Any:
    folder, _ = quantized_pair(tiny("llama", **HEADS), tmp_path)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def count(model: Any, kind: type) -> int:
    return sum(isinstance(module.__dict__.get("forward"), kind) for module in model.modules())


def blocks(model: Any) -> int:
    return count(model, NativeBlock)


def attentions(model: Any) -> int:
    return count(model, NativeAttention)


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the caches that blocks were called with, as they come."""
    found: list[int] = []
    real = CpuBlock.__call__

    def call(self: CpuBlock, x: Tensor, rotation: Any, keys: Tensor, *rest: Any) -> Tensor:
        found.append(keys.shape[2])
        return real(self, x, rotation, keys, *rest)

    monkeypatch.setattr(CpuBlock, "__call__", call)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_with_and_without(family: str, tmp_path: Path, tiny: Any, uses: list[int]) -> None:
    sizes, replaced, reason = FAMILIES[family]
    folder, _ = quantized_pair(tiny(family.split()[0], **sizes), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # the second row is padded on its left
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    fuse(model)
    assert blocks(model) == (2 if replaced == "blocks" else 0), reason
    assert attentions(model) == (2 if replaced == "attention" else 0), reason
    uses.clear()
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    window = sizes.get("sliding_window") or 100
    assert uses == ([min(10 + i, window) for i in range(11) for _ in range(2)] if replaced else [])
    assert torch.equal(model.generate(ids[:1], **GREEDY), expected[:1])
    unfuse(model)
    assert blocks(model) == attentions(model) == 0
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "olmo2", "qwen3_moe"])
@torch.no_grad()
def test_sixteen_bits_are_as_near_to_float32_as_before(
    family: str, dtype: torch.dtype, tmp_path: Path, tiny: Any
) -> None:
    folder, _ = quantized_pair(tiny(family, **FAMILIES[family][0]), tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = prompt(rows=8)

    def off() -> float:
        cache = DynamicCache()
        model(ids[:, :-1], past_key_values=cache)
        logits = model(ids[:, -1:], past_key_values=cache).logits[:, -1].float()
        return relative(logits, exact(ids).logits[:, -1])

    before = off()
    fuse(model)
    assert blocks(model) + attentions(model) == 2
    assert off() < 1.5 * before


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_ways_to_generate(options: dict[str, Any], model: Any) -> None:
    ids = prompt(rows=1)
    if "output_attentions" in options:
        model.set_attn_implementation("eager")
    expected = model.generate(ids, **GREEDY | options)
    fuse(model)
    got = model.generate(ids, **GREEDY | options)
    if "return_dict_in_generate" not in options:
        assert torch.equal(got, expected)
        return
    assert torch.equal(got.sequences, expected.sequences)
    kind = "attentions" if "output_attentions" in options else "hidden_states"
    for ours, theirs in zip(getattr(got, kind), getattr(expected, kind), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"max_seq_len": 64}, {}], ids=["of the model", "of the call"])
def test_static_caches(options: dict[str, int], model: Any, uses: list[int]) -> None:
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    fuse(model, **options)
    static = {} if options else {"cache_implementation": "static"}
    for _ in range(2):  # the second time in a cache that held something else
        uses.clear()
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **static), expected)
        assert uses == [10 + i for i in range(11) for _ in range(2)]


@torch.no_grad()
def test_a_static_cache_that_is_full_is_left_to_transformers(model: Any, uses: list[int]) -> None:
    fuse(model)
    cache = StaticCache(config=model.config, max_cache_len=10)
    model(prompt(), past_key_values=cache)
    uses.clear()
    model(prompt(length=1), past_key_values=cache)
    assert uses == [10, 10]
    with pytest.raises((RuntimeError, IndexError)):
        model(prompt(length=1), past_key_values=cache)


def test_a_conversation_goes_on_in_its_cache(model: Any, uses: list[int]) -> None:
    first = prompt(rows=1)
    whole = model.generate(first, **GREEDY)
    longer = torch.cat((whole, prompt(rows=1, length=5)), dim=1)
    expected = model.generate(longer, **GREEDY)
    fuse(model)
    cache = DynamicCache(config=model.config)
    uses.clear()
    assert torch.equal(model.generate(first, past_key_values=cache, **GREEDY), whole)
    assert torch.equal(model.generate(longer, past_key_values=cache, **GREEDY), expected)
    assert len(uses) == 2 * 2 * 11
    assert all(type(layer) is RoomyLayer for layer in cache.layers)


def replace(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.o_proj = copy.deepcopy(attention.o_proj)


def move(model: Any) -> None:
    model.model.layers[1].mlp.down_proj._release()


def release_queries(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj._release()


def see_queries(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)


def change_norm(model: Any) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data.clone()


def see_inside(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [replace, move, change_norm, see_inside])
def test_a_changed_block_is_the_module_again(
    change: Callable[[Any], None], model: Any, uses: list[int]
) -> None:
    expected = model.generate(prompt(), **GREEDY)
    fuse(model)
    change(model)
    uses.clear()
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert len(uses) == 11  # the other block's


@pytest.mark.parametrize("change", [replace, release_queries, see_queries])
def test_changed_attention_is_the_module_again(
    change: Callable[[Any], None], tmp_path: Path, tiny: Any, uses: list[int]
) -> None:
    folder, _ = quantized_pair(tiny("olmo2", **HEADS), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.generate(prompt(), **GREEDY)
    fuse(model)
    assert attentions(model) == 2
    change(model)
    uses.clear()
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert len(uses) == 11  # the other block's


def test_an_adapter_put_on_later_is_heard(model: Any) -> None:
    peft = pytest.importorskip("peft")
    fuse(model)
    before = model.generate(prompt(), **GREEDY)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    after = adapted.generate(input_ids=prompt(), **GREEDY)
    unfuse(adapted.base_model.model)
    assert torch.equal(adapted.generate(input_ids=prompt(), **GREEDY), after)
    assert not torch.equal(after, before)


def test_copies_generate_the_same(model: Any) -> None:
    fuse(model)
    twin = copy.deepcopy(model)
    expected = model.generate(prompt(), **GREEDY)
    assert torch.equal(twin.generate(prompt(), **GREEDY), expected)
    model.model.layers[0].input_layernorm.weight.data.mul_(3)
    assert torch.equal(twin.generate(prompt(), **GREEDY), expected)
    assert not torch.equal(model.generate(prompt(), **GREEDY), expected)


def scaled(by: Callable[[Any], Any]) -> Any:
    """A `forward` of Llama's attention whose result is multiplied."""
    real = modeling_llama.LlamaAttention.forward

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        out, weights = real(self, hidden_states, **kwargs)
        return out * by(kwargs), weights

    return forward


def late(kwargs: Any) -> Any:
    return 1 + 0.1 * (kwargs["position_ids"].unsqueeze(-1) > 8192)


def masked(kwargs: Any) -> float:
    return 1.0 if kwargs["attention_mask"] is None else 1.01


@pytest.mark.parametrize(
    ("place", "function"),
    [
        ("LlamaAttention.forward", scaled(lambda _: 1.01)),
        ("LlamaAttention.forward", scaled(late)),
        ("LlamaAttention.forward", scaled(masked)),
        ("rotate_half", lambda x: torch.cat((x[..., 8:], -x[..., :8]), dim=-1)),
        ("apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k)),
        ("LlamaMLP.forward", lambda self, x: self.down_proj(self.up_proj(x))),
        (
            "LlamaMLP.forward",
            lambda self, x: self.down_proj(self.act_fn(self.gate_proj(2 * x)) * self.up_proj(x)),
        ),
        (
            "LlamaMLP.forward",
            lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x)),
        ),
    ],
    ids=[
        "scaled",
        "scaled far away",
        "scaled with a mask",
        "turned back",
        "not turned",
        "no gate",
        "another gate",
        "a gate with a limit",
    ],
)
def test_a_block_that_computes_something_else_is_left_alone(
    place: str, function: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"transformers.models.llama.modeling_llama.{place}", function)
    expected = model.generate(prompt(), **GREEDY)
    fuse(model)
    assert blocks(model) == 0
    assert attentions(model) == (2 if "MLP" in place else 0)
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)


def test_queries_scaled_otherwise_than_told_are_noticed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]
    for factor, found in ((1.0, 2), (1.05, 0)):
        monkeypatch.setitem(
            modeling_llama.ALL_ATTENTION_FUNCTIONS._global_mapping,
            "sdpa",
            lambda module, query, *args, factor=factor, **kwargs: real(
                module, factor * query, *args, **kwargs
            ),
        )
        fuse(model)
        assert blocks(model) == found
        assert attentions(model) == 0
        unfuse(model)


def test_far_tokens_are_left_to_pytorch_where_it_is_faster(
    model: Any, uses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_FAR", 15)
    for pays, expected in ((True, 11), (False, 6)):
        monkeypatch.setattr(decoding, "pays", lambda pays=pays: pays)
        fuse(model)
        uses.clear()
        model.generate(prompt(), **GREEDY)
        assert len(uses) == 2 * expected
        unfuse(model)

"""Fused decoding: what is merged, that nothing else changes, and what happens where it cannot be done."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig, CompileConfig, GenerationConfig

from awq import QuantConfig, load_quantized
from awq.errors import ConfigError
from awq.hf import static
from awq.hf.fuse import _undo_native, fuse, unfuse
from awq.hf.static import StaticGeneration
from awq.nn import QuantExperts, QuantLinear
from awq.pipeline import quantize
from rounded import prompt, quantized_pair, relative, same_files

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
# Family, sizes, and the merges of a block by the names of their layers.
FAMILIES = {
    "llama": (
        {"num_key_value_heads": 2, "attention_bias": True},
        {"q_proj k_proj v_proj", "gate_proj up_proj"},
    ),
    "qwen3": ({"num_key_value_heads": 2, "head_dim": 32}, {"q_proj k_proj v_proj", "gate_proj up_proj"}),
    "gemma2": ({"num_key_value_heads": 2, "head_dim": 32}, {"q_proj k_proj v_proj", "gate_proj up_proj"}),
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64}, {"q_proj k_proj v_proj"}),
    "gpt_neox": ({}, set()),
    "phi3": ({"num_key_value_heads": 2}, set()),
}


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: Any) -> Path:
    return quantized_pair(tiny("llama", num_key_value_heads=2, attention_bias=True), tmp_path)[0]


@pytest.fixture
def quiet() -> Any:
    """No warning of ours may appear."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(fused|static|key/value)")
        yield


def load(folder: Path, **options: Any) -> Any:
    config = AwqConfig(**{"backend": "torch", **options})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def merges(model: Any) -> set[str]:
    """The layers of each merge, by the last part of their names."""
    names = {module: name for name, module in model.named_modules()}
    found = {m._merge for m in names if isinstance(m, QuantLinear) and m._merge is not None}
    return {" ".join(names[layer].rpartition(".")[2] for layer in merge.members) for merge in found}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_read_the_same_are_found_and_logits_are_the_same_bits(
    family: str, tiny: Any, tmp_path: Path, quiet: None
) -> None:
    sizes, expected = FAMILIES[family]
    folder, _ = quantized_pair(tiny(family, **sizes), tmp_path)
    fused = load(folder, do_fuse=True)
    assert {" ".join(sorted(each.split())) for each in merges(fused)} == {
        " ".join(sorted(each.split())) for each in expected
    }
    expected = load(folder)(prompt()).logits
    assert relative(fused(prompt()).logits, expected) < 1e-6
    _undo_native(fused)
    assert torch.equal(fused(prompt()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["auto", "cpu-int4"])
def test_other_kernels_give_the_same_within_their_precision(kernel: str, checkpoint: Path) -> None:
    plain, fused = load(checkpoint, backend=kernel), load(checkpoint, backend=kernel, do_fuse=True)
    assert relative(fused(prompt()).logits, plain(prompt()).logits) < 1e-6


@torch.no_grad()
def test_experts_are_left_alone_and_their_attention_is_merged(tiny: Any, tmp_path: Path) -> None:
    sizes = {"num_local_experts": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    folder, _ = quantized_pair(tiny("mixtral", **sizes), tmp_path)
    with pytest.warns(UserWarning, match="grows as it is needed, without a fixed length: transformers does"):
        fused = load(folder, do_fuse=True, fuse_max_seq_len=64)
    assert merges(fused) == {"q_proj k_proj v_proj"}
    experts = [module for module in fused.modules() if isinstance(module, QuantExperts)]
    assert experts and not any(merges(module) for module in experts)
    expected = load(folder)(prompt()).logits
    assert relative(fused(prompt()).logits, expected) < 1e-6
    _undo_native(fused)
    assert torch.equal(fused(prompt()).logits, expected)


def test_a_fused_model_is_saved_as_it_was_loaded(checkpoint: Path, tmp_path: Path) -> None:
    fused = load(checkpoint, do_fuse=True, fuse_max_seq_len=64)
    fused.generate(prompt(), **GREEDY)
    plain = load(checkpoint).state_dict()
    assert list(fused.state_dict()) == list(plain)
    fused.save_pretrained(tmp_path / "saved")
    same_files(checkpoint, tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        text = (tmp_path / "saved" / name).read_text()
        assert "fuse" not in text and "static" not in text and "max_cache_len" not in text
    assert not merges(load(tmp_path / "saved"))


def test_what_a_checkpoint_says_of_fusing_is_nobodys_request(tiny: Any, tmp_path: Path, quiet: None) -> None:
    entry = {"do_fuse": True, "fuse_max_seq_len": 4, "modules_to_fuse": {"mlp": ["up_proj"]}}
    folder, _ = quantized_pair(tiny("llama"), tmp_path, entry=entry)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not merges(model) and "generate" not in model.__dict__


@pytest.mark.parametrize("fields", [{"do_fuse": True, "fuse_max_seq_len": 64}, {"fuse_max_seq_len": 64}])
def test_the_static_cache_has_the_length_that_was_asked_for(
    fields: dict[str, Any], checkpoint: Path, quiet: None
) -> None:
    fused, plain = load(checkpoint, **fields), load(checkpoint)
    out = fused.generate(prompt(), return_dict_in_generate=True, **GREEDY)
    assert type(out.past_key_values).__name__ == "StaticCache"
    assert out.past_key_values.layers[0].keys.shape[2] == 64
    for rows, length in ((2, 9), (1, 1), (3, 50), (2, 9)):
        ids = prompt(rows, length)
        assert torch.equal(fused.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))


def test_what_does_not_fit_the_cache_is_generated_with_one_that_grows_and_told(checkpoint: Path) -> None:
    fused, plain = load(checkpoint, fuse_max_seq_len=20), load(checkpoint)
    with pytest.warns(UserWarning, match=r"21 tokens .* static cache of 20") as caught:
        out = fused.generate(prompt(), return_dict_in_generate=True, **GREEDY)
    assert [each.filename for each in caught if "static" in str(each.message)] == [__file__]
    assert type(out.past_key_values).__name__ == "DynamicCache"
    assert torch.equal(out.sequences, plain.generate(prompt(), **GREEDY))


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"generation_config": GenerationConfig(**GREEDY, use_cache=False)},
    ],
)
def test_a_call_that_chooses_its_cache_gets_it(
    options: dict[str, Any], checkpoint: Path, quiet: None
) -> None:
    fused = load(checkpoint, fuse_max_seq_len=64)
    own = {} if "generation_config" in options else GREEDY
    out = fused.generate(prompt(), return_dict_in_generate=True, **own, **options)
    assert type(getattr(out, "past_key_values", None)).__name__ != "StaticCache"
    assert torch.equal(out.sequences, load(checkpoint).generate(prompt(), **GREEDY))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_and_a_generation_config_work_with_the_static_cache(
    options: dict[str, Any], checkpoint: Path, quiet: None
) -> None:
    fused, plain = load(checkpoint, fuse_max_seq_len=64), load(checkpoint)
    config = GenerationConfig(**GREEDY, **options)
    expected = plain.generate(prompt(), generation_config=config)
    assert torch.equal(fused.generate(prompt(), generation_config=config), expected)
    assert config.cache_implementation is None


def test_rows_of_a_left_padded_batch_give_what_they_give_alone(books6m: Path, tmp_path: Path) -> None:
    quantize(books6m, tmp_path / "out", QuantConfig(group_size=32, method="rtn"), samples=2, seq_len=64)
    tokenizer = AutoTokenizer.from_pretrained(books6m, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    fused = load_quantized(tmp_path / "out", dtype=torch.float32, fuse=True, max_seq_len=48)
    assert isinstance(fused.generate, StaticGeneration)
    plain = load_quantized(tmp_path / "out", dtype=torch.float32)
    texts = ["The old man", "It was in the early summer of that year that we went", "She said"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert (batch["attention_mask"][0] == 0).any()
    together = fused.generate(**batch, pad_token_id=0, **GREEDY)
    for row, text in zip(together, texts, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        for model in (fused, plain):
            assert torch.equal(row[-12:], model.generate(**alone, pad_token_id=0, **GREEDY)[0, -12:]), text


def test_generate_compiles_a_fused_model_whole_and_once(checkpoint: Path) -> None:
    torch._dynamo.reset()
    fused, plain = load(checkpoint, fuse_max_seq_len=64), load(checkpoint)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told so
    torch._dynamo.utils.counters.clear()
    for length in (9, 5, 30):
        ids = prompt(2, length)
        compiled = fused.generate(ids, compile_config=config, **GREEDY)
        assert torch.equal(compiled, plain.generate(ids, **GREEDY))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_where_the_compiler_can_do_better_it_is_told_unless_the_caller_tells_it(
    checkpoint: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = load(checkpoint, fuse_max_seq_len=64)
    given: list[Any] = []
    monkeypatch.setattr(type(fused), "generate", lambda self, *_, **kwargs: given.append(kwargs))
    fused.generate(prompt(), **GREEDY)  # on a CPU there is nothing to tell
    monkeypatch.setattr(static, "how_to_compile", lambda device: {"combo_kernels": True})
    fused.generate(prompt(), **GREEDY)
    own = CompileConfig(mode="default")
    fused.generate(prompt(), compile_config=own, **GREEDY)
    assert "compile_config" not in given[0]
    assert given[1]["compile_config"].options == {"combo_kernels": True}
    assert given[1]["compile_config"].mode is None
    assert given[2]["compile_config"] is own


def test_fusing_can_be_undone(checkpoint: Path) -> None:
    fused = load(checkpoint, fuse_max_seq_len=64)
    expected = fused(prompt()).logits
    unfuse(fused)
    assert not merges(fused) and not isinstance(fused.generate, StaticGeneration)
    assert torch.equal(fused(prompt()).logits, expected)


def test_a_fused_model_can_be_dequantized(checkpoint: Path) -> None:
    fused, plain = load(checkpoint, do_fuse=True), load(checkpoint)
    assert torch.equal(fused.dequantize()(prompt()).logits, plain.dequantize()(prompt()).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_fused_layers_have_the_gradients_they_have_on_layers_apart(
    checkpointing: bool, checkpoint: Path
) -> None:
    peft = pytest.importorskip("peft", reason="the optional package peft is not installed")
    gradients = []
    for options in ({}, {"do_fuse": True}):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=False
        )
        model = peft.get_peft_model(load(checkpoint, **options), config)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()(prompt(), labels=prompt()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


def test_layers_with_adapters_on_them_are_not_merged(checkpoint: Path) -> None:
    peft = pytest.importorskip("peft", reason="the optional package peft is not installed")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], r=4)
    model = peft.get_peft_model(load(checkpoint), config).eval()
    fuse(model)
    assert merges(model) == {"k_proj v_proj"}


def told(model: Any, match: str) -> None:
    with pytest.warns(UserWarning, match=f"layers are not fused: .*{match}") as caught:
        assert fuse(model, 64) == []
    assert len([each for each in caught if "fused" in str(each.message)]) == 1
    assert not isinstance(model.generate, StaticGeneration)


def test_what_cannot_be_fused_is_left_as_it_is_and_one_warning_says_why(checkpoint: Path) -> None:
    told(load(checkpoint).train(), "training mode")
    told(load(checkpoint, do_fuse=True), "fused already")
    told(load(checkpoint).dequantize(), "no quantized layers")


@pytest.mark.parametrize(
    ("second", "told", "fused"),
    [
        ("cpu", "grows as it is needed, .*: the model is spread over several devices or offloaded", 2),
        ("disk", "layers are not fused: all of them are offloaded", 0),
    ],
)
def test_of_an_offloaded_model_what_is_in_memory_is_fused(
    second: str, told: str, fused: int, checkpoint: Path, tmp_path: Path
) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": second}
    options = {"device_map": places, "offload_folder": tmp_path / "offload", "dtype": torch.float32}
    with pytest.warns(UserWarning, match=told) as caught:
        model = load_quantized(checkpoint, fuse=True, max_seq_len=64, **options)
    assert len([each for each in caught if "fused" in str(each.message) or "grows" in str(each.message)]) == 1
    assert len(merges(model)) == fused
    assert not isinstance(model.generate, StaticGeneration)
    for _ in range(2):
        assert relative(model(prompt()).logits, load(checkpoint)(prompt()).logits) < 1e-5


def test_a_merge_that_changes_the_output_is_undone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(checkpoint)
    expected = model(prompt()).logits
    product = "awq.nn.merge.Merge.product"
    with monkeypatch.context() as patch:
        patch.setattr(
            product, lambda self, member, inputs: inputs.new_ones(*inputs.shape[:-1], member.out_features)
        )
        with pytest.warns(UserWarning, match="not fused: .*its output changes"):
            assert fuse(model) == []
    assert not merges(model)
    assert torch.equal(model(prompt()).logits, expected)


@pytest.mark.parametrize("length", [0, -3, "many"])
def test_a_length_without_meaning_is_refused(length: Any, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="is no number of tokens"):
        AwqConfig(fuse_max_seq_len=length)

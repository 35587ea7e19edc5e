"""Generating: static caches, compilation without breaks, and padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig, CompileConfig

from awq import QuantConfig
from awq.kernels import native
from awq.pipeline import quantize
from rounded import prompt, quantized_pair, relative

KERNELS = ["torch", "cpu-int4", "auto"]


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: Any) -> Path:
    return quantized_pair(tiny("llama", num_key_value_heads=2, attention_bias=True), tmp_path)[0]


def load(folder: Path, kernel: str = "auto") -> Any:
    torch._dynamo.reset()
    config = AwqConfig(backend=kernel)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def generated(model: Any, **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        prompt(), max_new_tokens=12, min_new_tokens=12, do_sample=False, **options
    )
    return tokens


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_static_cache_gives_the_tokens_of_a_growing_one(kernel: str, checkpoint: Path) -> None:
    model = load(checkpoint, kernel)
    assert torch.equal(generated(model), generated(model, cache_implementation="static"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_generate_compiles_the_model_whole(kernel: str, checkpoint: Path) -> None:
    model = load(checkpoint, kernel)
    assert model.hf_quantizer.is_compileable
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told so
    expected = generated(model)
    torch._dynamo.utils.counters.clear()
    compiled = generated(model, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_torch_compile_sees_one_graph_with_the_same_logits(kernel: str, checkpoint: Path) -> None:
    model = load(checkpoint, kernel)
    expected = model(prompt(), use_cache=False).logits
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert relative(compiled(prompt(), use_cache=False).logits, expected) < 1e-6
    (graph,) = graphs
    products = [node for node in graph.graph.nodes if "openawq.multiply" in str(node.target)]
    assert len(products) == 14


@pytest.mark.slow
@torch.no_grad()
def test_the_default_compiler_gives_the_same_logits(checkpoint: Path) -> None:
    if native.compiler() is None:
        pytest.skip("PyTorch's default compiler writes C++, and there is no C++ compiler")
    model = load(checkpoint)
    expected = model(prompt(), use_cache=False).logits
    assert relative(torch.compile(model)(prompt(), use_cache=False).logits, expected) < 1e-5


def test_experts_do_not_claim_to_be_compileable_and_compile_with_breaks(tiny: Any, tmp_path: Path) -> None:
    sizes = {"num_local_experts": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    folder, _ = quantized_pair(tiny("mixtral", **sizes), tmp_path)
    model = load(folder)
    assert not model.hf_quantizer.is_compileable
    with torch.no_grad():
        expected = model(prompt(), use_cache=False).logits
        compiled = torch.compile(model, backend="eager")
        assert relative(compiled(prompt(), use_cache=False).logits, expected) < 1e-6


def test_rows_of_a_left_padded_batch_give_what_they_give_alone(books6m: Path, tmp_path: Path) -> None:
    quantize(books6m, tmp_path / "out", QuantConfig(group_size=32, method="rtn"), samples=2, seq_len=64)
    tokenizer = AutoTokenizer.from_pretrained(books6m, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load(tmp_path / "out")
    texts = ["The old man", "It was in the early summer of that year that we went", "She said"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert (batch["attention_mask"][0] == 0).any()
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    for row, text in zip(together, texts, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        single = model.generate(alone["input_ids"], attention_mask=alone["attention_mask"], **options)
        assert torch.equal(row[-16:], single[0, -16:]), text

"""The calls of AutoAWQ's README and examples that run, judge and train a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from awq.utils.utils import get_best_device
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextStreamer,
    Trainer,
    TrainingArguments,
)

from autoawq_calls import PROMPT
from awq import AutoAWQForCausalLM
from awq.auto_model import AWQModel
from awq.hf.static import StaticGeneration

pytestmark = pytest.mark.usefixtures("unanswered")


# generate.py, basic_generate.py, exllama_generate.py, marlin_generate.py


def test_the_generate_example_streams_a_continuation(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoAWQForCausalLM.from_quantized(
        str(quantized), torch_dtype=torch.float16, low_cpu_mem_usage=True, device_map="auto"
    )
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    inputs = tokenizer(PROMPT, return_tensors="pt").to(get_best_device())
    output = model.generate(
        **inputs,
        do_sample=True,
        max_new_tokens=8,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        eos_token_id=[tokenizer.eos_token_id],
    )
    assert model.dtype == torch.float16
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert capsys.readouterr().out.strip()


def test_the_readmes_max_seq_len_limits_the_length(quantized: Path, tokenizer: Any) -> None:
    model = AutoAWQForCausalLM.from_quantized(str(quantized), fuse_layers=True)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    longest = tokens.shape[1] + 3
    assert model.generate(tokens, max_seq_len=longest, min_length=longest).shape[1] == longest


def test_fused_layers_generate_what_the_others_do_for_any_batch_and_length(
    quantized: Path, silent: None
) -> None:
    """The README's call with all that AutoAWQ needed for it: its lengths had to be known, and its padding was
    not masked."""
    plain = AutoAWQForCausalLM.from_quantized(str(quantized), fuse_layers=False, torch_dtype=torch.float32)
    fused = AutoAWQForCausalLM.from_quantized(
        str(quantized), fuse_layers=True, max_seq_len=64, batch_size=2, torch_dtype=torch.float32
    )
    attention = fused.model.model.layers[0].self_attn
    assert attention.q_proj._merge is attention.k_proj._merge is attention.v_proj._merge is not None
    assert isinstance(fused.model.generate, StaticGeneration) and fused.model.generate.length == 64
    for rows, length in ((1, 1), (3, 9), (2, 40), (1, 9)):
        tokens = torch.randint(3, 4096, (rows, length), generator=torch.Generator().manual_seed(length))
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
        assert torch.equal(fused.generate(tokens, **options), plain.generate(tokens, **options))


def test_the_default_length_asks_for_no_static_cache_on_a_cpu(quantized: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(str(quantized), fuse_layers=True, device_map="cpu")
    assert not isinstance(model.model.generate, StaticGeneration)
    assert model.model.model.layers[0].mlp.up_proj._merge is not None


def test_fuse_layers_can_be_called_on_a_model_that_is_loaded(quantized: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(str(quantized), fuse_layers=False)
    model.fuse_layers(model)
    assert model.model.model.layers[0].mlp.up_proj._merge is not None


def test_every_kernel_switch_gives_the_same_tokens(quantized: Path, tokenizer: Any) -> None:
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    plain = AutoAWQForCausalLM.from_quantized(str(quantized), fuse_layers=False)
    expected = plain.generate(tokens, max_new_tokens=8)
    for switch in ("use_exllama", "use_exllama_v2", "use_ipex", "use_qbits"):
        with pytest.warns(UserWarning, match=f"{switch} has no effect"):
            other = AutoAWQForCausalLM.from_quantized(str(quantized), fuse_layers=False, **{switch: True})
        assert torch.equal(other.generate(tokens, max_new_tokens=8), expected)


# benchmark.py: positional file name, max_new_tokens when loading, calls with a cache


def test_the_benchmark_example_decodes_by_hand(quantized: Path, tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="max_new_tokens has no effect"):
        model = AutoAWQForCausalLM.from_quantized(
            str(quantized), "model.safetensors", fuse_layers=False, max_new_tokens=4, batch_size=1
        )
    device = next(model.parameters()).device
    ids = torch.randint(0, tokenizer.vocab_size, (2, 8))
    out = model(torch.as_tensor(ids, device=device), use_cache=True)
    token = out[0][:, -1].max(1)[1].unsqueeze(1)
    assert token.shape == (2, 1)


def test_the_benchmark_example_s_other_generator_measures_each_token(quantized: Path) -> None:
    """As the example has it, but for `eos_token_id=-100`, which transformers refuses by now."""
    steps = []

    class Times(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            steps.append(input_ids.shape[1])
            return scores

    model: AWQModel = AutoAWQForCausalLM.from_quantized(str(quantized), "", fuse_layers=False)
    generation_config = GenerationConfig(min_new_tokens=4, max_new_tokens=4, use_cache=True)
    model.generate(
        torch.randint(3, 4096, (2, 8)),
        generation_config=generation_config,
        logits_processor=LogitsProcessorList([Times()]),
    )
    assert steps == [8, 9, 10, 11]
    assert model.quant_config.version == "gemm"


# eval.py


def test_the_eval_example_measures_perplexity(
    books6m: Path, quantized: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from awq.evaluation.eval_utils import evaluate_perplexity

    from awq.calibration import read_text

    datasets = pytest.importorskip("datasets", reason="an optional package of the product")
    held_out = read_text("bundled")[:20_000]
    rows = {"text": [held_out[:9000], held_out[9000:]]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    model = AutoAWQForCausalLM.from_quantized(str(quantized), "", fuse_layers=False)
    assert 5 < evaluate_perplexity(model.model, tokenizer) < 200
    with pytest.warns(UserWarning, match="safetensors has no effect"):
        original = AutoAWQForCausalLM.from_pretrained(str(books6m), safetensors=False)
    assert evaluate_perplexity(original.model, tokenizer) < evaluate_perplexity(model.model, tokenizer)


def test_the_eval_example_s_imports_are_all_there() -> None:
    from awq.evaluation.eval_utils import eval_librispeech, eval_mmlu, evaluate_perplexity

    assert all(map(callable, (eval_librispeech, eval_mmlu, evaluate_perplexity)))


# train.py


def test_the_training_example_trains_an_adapter_and_saves_it(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the example has it, but for `evaluation_strategy`, which transformers renamed `eval_strategy`."""
    datasets = pytest.importorskip("datasets", reason="an optional package of the product")
    peft = pytest.importorskip("peft", reason="an optional package of the product")
    rows = {"instruction": ["Say where you are.", "Count."], "output": ["At sea.", "One, two, three."]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_dict(rows))
    monkeypatch.chdir(tmp_path)

    def prepare_split(tokenizer: Any) -> Any:
        data = datasets.load_dataset("mhenrichsen/alpaca_2k_test", split="train")
        template = "<s>[INST] {prompt} [/INST] {output}</s>"
        data = data.map(
            lambda x: {"text": template.format(prompt=x["instruction"], output=x["output"])}
        ).select_columns(["text"])
        return data.map(lambda x: tokenizer(x["text"]), batched=True)

    model = AutoAWQForCausalLM.from_quantized(str(quantized), fuse_layers=False)
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    tokenizer.pad_token = tokenizer.eos_token
    data_train = prepare_split(tokenizer)
    lora_config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.5, bias="none", task_type=peft.TaskType.CAUSAL_LM,
        inference_mode=False,
    )  # fmt: skip
    model = peft.get_peft_model(model.model, lora_config)
    model.print_trainable_parameters()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    training_arguments = TrainingArguments(
        output_dir="./output", per_device_train_batch_size=1, optim="adamw_torch", num_train_epochs=1,
        learning_rate=1e-4, eval_strategy="no", save_strategy="epoch", save_steps=100, logging_steps=50,
        eval_steps=None, load_best_model_at_end=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        train_dataset=data_train,
        args=training_arguments,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model("output")
    assert trainer.state.global_step == 2
    changed = {n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert {name for name in before if "lora_B" in name} <= changed
    saved = load_file(tmp_path / "output/adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)

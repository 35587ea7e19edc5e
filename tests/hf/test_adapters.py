"""PEFT: adapters on quantized models train, are saved and loaded, and merge into dequantized models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AwqConfig, Trainer, TrainingArguments

from awq.errors import ConfigError
from rounded import prompt, quantized_pair, relative, same_files

peft = pytest.importorskip("peft", reason="the optional package peft is not installed")

FAMILIES = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
}


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tiny: Any, tmp_path: Path) -> Path:
    return quantized_pair(tiny(request.param, **FAMILIES[request.param]), tmp_path)[0]


@pytest.fixture
def llama(tiny: Any, tmp_path: Path) -> Path:
    return quantized_pair(tiny("llama", **FAMILIES["llama"]).to(torch.bfloat16), tmp_path)[0]


def load(folder: Path, kernel: str = "torch", dtype: torch.dtype = torch.float32) -> Any:
    config = AwqConfig(backend=kernel)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def lora(**options: Any) -> Any:
    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def losses(model: Any, steps: int = 8) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    model.train()
    for _ in range(steps):
        loss = model(prompt(), labels=prompt()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    model.eval()
    return found


def test_adapters_on_all_linear_layers_train_are_saved_loaded_and_merge(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = peft.get_peft_model(load(checkpoint), lora())
    adapted = {n for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert any("q_proj" in name for name in adapted)
    assert any("up_proj" in name or ".experts.3.w3" in name for name in adapted)
    assert not any("lm_head" in name for name in adapted)
    found = losses(model)
    assert found[-1] < 0.8 * found[0]
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(prompt()).logits
        again = peft.PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter").eval()
        assert relative(again(prompt()).logits, expected) < 1e-6
        plain = load(checkpoint).dequantize()
        merged = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
        assert relative(merged(prompt()).logits, expected) < 1e-4
        assert relative(load(checkpoint)(prompt()).logits, expected) > 0.01  # the adapter does something


@pytest.mark.parametrize("kernel", ["torch", "cpu-int4", "auto"])
def test_gradients_of_adapters_are_those_of_the_dequantized_model(kernel: str, llama: Path) -> None:
    def gradients(base: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = peft.get_peft_model(base, lora(init_lora_weights=False))
        model(prompt(), labels=prompt()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ours, reference = gradients(load(llama, kernel)), gradients(load(llama).dequantize())
    assert len(ours) == 28
    assert ours.keys() == reference.keys()
    for name, gradient in ours.items():
        # PyTorch's kernel rounds activations to bfloat16.
        assert relative(gradient, reference[name]) < (1e-4 if kernel == "torch" else 0.1), name


def test_merging_into_codes_is_refused_with_the_cure(llama: Path) -> None:
    model = peft.get_peft_model(load(llama), lora(init_lora_weights=False))
    with pytest.raises(ConfigError, match=r"model\.dequantize\(\)"):
        model.merge_and_unload()
    with pytest.raises(ConfigError, match=r"model\.dequantize\(\)"):
        model.merge_adapter(safe_merge=True)


def test_unloading_an_adapter_gives_the_quantized_model_back(llama: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(load(llama, dtype=torch.bfloat16), lora())
    losses(model, steps=1)
    model.unload().save_pretrained(tmp_path / "saved")
    same_files(llama, tmp_path / "saved")


def test_preparing_for_kbit_training_casts_what_is_float_and_leaves_the_codes_alone(llama: Path) -> None:
    model = load(llama, "cpu-int4", torch.bfloat16)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    state, stored = model.state_dict(), load_file(llama / "model.safetensors")
    packed = [name for name in stored if name.endswith(("qweight", "qzeros", "scales"))]
    assert all(torch.equal(state[name], stored[name]) for name in packed)
    found = losses(peft.get_peft_model(model, lora()))
    assert found[-1] < 0.8 * found[0]


def test_gradient_checkpointing_gives_the_same_losses(llama: Path) -> None:
    def run(checkpointing: bool) -> list[float]:
        torch.manual_seed(0)
        model = peft.get_peft_model(load(llama), lora())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return losses(model, steps=3)

    assert run(True) == pytest.approx(run(False), rel=1e-5)


def test_dora_computes_on_quantized_layers(llama: Path) -> None:
    found = losses(peft.get_peft_model(load(llama), lora(use_dora=True)))
    assert found[-1] < 0.8 * found[0]


def test_transformers_own_adapters_and_trainer_accept_a_quantized_model(llama: Path, tmp_path: Path) -> None:
    model = load(llama)
    model.add_adapter(lora())
    rows = [{"input_ids": row, "labels": row} for row in prompt(rows=8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=4,
        report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < history[0]
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()

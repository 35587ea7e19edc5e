"""Experts: per-expert codes under the hub's names, for architectures whose experts transformers fuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AwqConfig

from awq.errors import LoadError
from awq.nn import QuantExperts
from moe_sizes import LATENT, MIXTRAL, MOE
from rounded import FLOAT, prompt, quantized_pair, relative, same_files

EXACT = {"dtype": torch.float32, "quantization_config": AwqConfig(backend="torch")}
# Family: changes to the tiny model, a name that its checkpoints must hold.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": (MIXTRAL, "model.layers.1.block_sparse_moe.experts.3.w1.qweight"),
    "qwen2_moe": (
        {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
        "model.layers.1.mlp.experts.3.gate_proj.qweight",
    ),
    "qwen3_moe": (
        {**MOE, "num_experts": 4, "head_dim": 16, "mlp_only_layers": [0]},
        "model.layers.1.mlp.experts.3.up_proj.qweight",
    ),
    "deepseek_v3": ({**MOE, **LATENT}, "model.layers.1.mlp.experts.3.down_proj.qweight"),
    "olmoe": ({**MOE, "num_experts": 4}, "model.layers.1.mlp.experts.3.down_proj.qweight"),
    "glm4_moe": (
        {**MOE, **LATENT, "head_dim": 16},
        "model.layers.1.mlp.experts.3.down_proj.qweight",
    ),
    "phimoe": (MIXTRAL, "model.layers.1.block_sparse_moe.experts.3.w2.qweight"),
    # No gate: one projection up, a squared ReLU, one down.
    "nemotron_h": (
        {**MOE, "n_routed_experts": 4, "head_dim": 16, "layers_block_type": ["attention", "moe"]},
        "backbone.layers.1.mixer.experts.3.up_proj.qweight",
    ),
}  # fmt: skip


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_experts_give_the_dequantized_logits_and_are_saved_under_hub_names(
    family: str, tiny: Any, tmp_path: Path
) -> None:
    changes, name = FAMILIES[family]
    quantized, plain = quantized_pair(tiny(family, **changes), tmp_path)
    assert name in load_file(quantized / "model.safetensors")
    model, info = load(quantized, output_loading_info=True, **EXACT)
    assert not any(info.values()), info
    assert any(isinstance(module, QuantExperts) for module in model.modules())
    expected = load(plain, dtype=torch.float32)(prompt(), use_cache=False).logits
    assert relative(model(prompt(), use_cache=False).logits, expected) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    same_files(quantized, tmp_path / "saved")
    back = model.dequantize()
    assert not any(isinstance(module, QuantExperts) for module in back.modules())
    assert relative(back(prompt(), use_cache=False).logits, expected) < 1e-5
    back.save_pretrained(tmp_path / "back")
    same_files(plain, tmp_path / "back")


@pytest.fixture
def mixtral(tiny: Any, tmp_path: Path) -> Path:
    return quantized_pair(tiny("mixtral", **MIXTRAL), tmp_path)[0]


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def test_the_default_kernel_serves_experts_too(mixtral: Path) -> None:
    """The experts alone: near-ties of a random router would hide what is compared."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 64, generator=generator)
    index, weights = torch.tensor([[0, 1], [2, 3], [0, 3]] * 2), torch.rand(6, 2, generator=generator)
    exact = load(mixtral, **EXACT).model.layers[0].mlp.experts(hidden, index, weights)
    model = load(mixtral, dtype=torch.bfloat16)
    assert "kernel=cpu-" in repr(model.model.layers[0].mlp.experts)
    fast = model.model.layers[0].mlp.experts(hidden.bfloat16(), index, weights)
    assert relative(fast.float(), exact) < 0.03
    assert model.generate(prompt(), max_new_tokens=3, min_new_tokens=3).shape == (2, 12)


def test_a_missing_expert_is_an_error_not_a_random_one(mixtral: Path) -> None:
    stem = "model.layers.1.block_sparse_moe.experts.2.w3"
    edit(mixtral, lambda tensors: [tensors.pop(f"{stem}.{s}") for s in ("qweight", "qzeros", "scales")])
    with pytest.raises(LoadError, match=r"experts\.2\.w3: the experts of a layer are quantized all or none"):
        load(mixtral)


def test_a_missing_projection_of_all_experts_is_an_error(mixtral: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".w2." in n]:
            del tensors[name]

    edit(mixtral, drop)
    with pytest.raises(LoadError, match="down_proj"):
        load(mixtral)


def test_an_expert_too_many_is_an_error(mixtral: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "layers.0" in n and ".experts.3." in n]:
            tensors[name.replace(".experts.3.", ".experts.4.")] = tensors[name].clone()

    edit(mixtral, add)
    with pytest.raises(LoadError, match=r"experts\.4.* has 4 experts"):
        load(mixtral)


@torch.no_grad()
def test_layers_whose_experts_stayed_float_are_loaded_fused(tiny: Any, tmp_path: Path) -> None:
    """Some recipes leave a layer alone; both kinds live in one model and one file."""
    keep = re.compile(rf"{FLOAT.pattern}|layers\.0\.block_sparse_moe")
    quantized, plain = quantized_pair(tiny("mixtral", **MIXTRAL), tmp_path, keep)
    model, info = load(quantized, output_loading_info=True, **EXACT)
    assert not any(info.values()), info
    kinds = [isinstance(layer.mlp.experts, QuantExperts) for layer in model.model.layers]
    assert kinds == [False, True]
    assert relative(model(prompt()).logits, load(plain, dtype=torch.float32)(prompt()).logits) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    same_files(quantized, tmp_path / "saved")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16, "num_key_value_heads": 2}),
        (
            "llama4_text",
            {"num_local_experts": 4, "head_dim": 16, "num_key_value_heads": 2, "intermediate_size_mlp": 64},
        ),
    ],
)
def test_codes_of_some_experts_only_are_refused_by_name(
    family: str, changes: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    quantized, _ = quantized_pair(tiny(family, **changes), tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    fused = next(name for name in tensors if "layers.1." in name and name.endswith("experts.down_proj"))
    stem = fused.replace("experts.down_proj", "experts.0.down_proj")
    source = next(n.removesuffix(".qweight") for n in tensors if n.endswith("q_proj.qweight"))
    for suffix in ("qweight", "qzeros", "scales"):
        tensors[f"{stem}.{suffix}"] = tensors[f"{source}.{suffix}"].clone()
    save_file(tensors, quantized / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"layers\.1\..*experts\.0\.gate_proj.*all or none"):
        load(quantized)

"""Layers of experts in one call: found where they are what they should be, and the same tokens as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe import modeling_qwen3_moe

from awq.hf.fuse import fuse, unfuse
from awq.hf.fused.expert_decoding import NativeExperts
from awq.kernels.cpu_experts import CpuExperts
from moe_sizes import LATENT, MIXTRAL, MOE
from rounded import prompt, quantized_pair, relative

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
FOUR = {**MOE, "num_experts": 4}
QWEN3 = {**FOUR, "head_dim": 16}
# Family, sizes, and how many of its two layers are replaced.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "mixtral": (MIXTRAL, 2),
    "qwen2_moe": ({**FOUR, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1}, 2),
    "qwen3_moe": (QWEN3, 2),
    "qwen3_moe with one dense layer": (QWEN3 | {"mlp_only_layers": [0]}, 1),
    "deepseek_v3": ({**MOE, **LATENT}, 1),
    "olmoe": (FOUR, 2),
    "glm4_moe": ({**MOE, **LATENT, "head_dim": 16}, 1),
    # A squared ReLU and no gate.
    "nemotron_h": (
        {**MOE, "n_routed_experts": 4, "head_dim": 16, "layers_block_type": ["attention", "moe"]},
        0,
    ),
}

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture
def model(tmp_path: Path, tiny: Any) -> Any:
    folder, _ = quantized_pair(tiny("qwen3_moe", **QWEN3), tmp_path)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens experts were called with, as they come."""
    found: list[int] = []
    real = CpuExperts.__call__

    def call(self: CpuExperts, x: Tensor, *rest: Any) -> Tensor:
        found.append(len(x))
        return real(self, x, *rest)

    monkeypatch.setattr(CpuExperts, "__call__", call)
    return found


def replaced(model: Any) -> int:
    return sum(isinstance(module.__dict__.get("forward"), NativeExperts) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_with_and_without(family: str, tmp_path: Path, tiny: Any, uses: list[int]) -> None:
    sizes, layers = FAMILIES[family]
    folder, _ = quantized_pair(tiny(family.split()[0], **sizes), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.generate(prompt(), **GREEDY)
    fuse(model)
    assert replaced(model) == layers
    uses.clear()
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert uses == [18] * layers + [2] * (7 * layers)
    unfuse(model)
    assert replaced(model) == 0
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_sixteen_bits_are_as_near_to_float32_as_before(dtype: torch.dtype, tmp_path: Path, tiny: Any) -> None:
    folder, _ = quantized_pair(tiny("qwen3_moe", **QWEN3), tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = prompt(rows=6)
    before = relative(model(ids).logits.float(), exact(ids).logits)
    fuse(model)
    assert replaced(model) == 2
    assert relative(model(ids).logits.float(), exact(ids).logits) < 1.5 * before


def experts_of(model: Any, layer: int = 1) -> Any:
    return model.model.layers[layer].mlp.experts


def replace(model: Any) -> None:
    for number in range(4):
        expert = experts_of(model).get_submodule(str(number))
        expert["up_proj"] = copy.deepcopy(expert["up_proj"])


def exchange(model: Any) -> None:
    experts = experts_of(model)
    first, second = (experts.get_submodule(name) for name in "01")
    experts._modules.update({"0": second, "1": first})
    experts._modules.update({"0": first, "1": copy.deepcopy(second)})


def move(model: Any) -> None:
    for number in range(4):
        experts_of(model).layers(number, ["down_proj"])[0]._release()


def see_inside(model: Any) -> None:
    for number in range(4):
        experts_of(model).layers(number, ["gate_proj"])[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [replace, exchange, move, see_inside])
def test_a_changed_layer_is_the_module_again(
    change: Callable[[Any], None], model: Any, uses: list[int]
) -> None:
    expected = model.generate(prompt(), **GREEDY)
    fuse(model)
    change(model)
    uses.clear()
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert len(uses) == 8  # the other layer's


def test_long_prompts_and_gradients_are_the_module_s(model: Any, uses: list[int]) -> None:
    fuse(model)
    uses.clear()
    with torch.no_grad():
        model(prompt(rows=1, length=65))
    assert uses == []
    model(prompt(rows=1, length=3))
    assert uses == []
    with torch.no_grad():
        model(prompt(rows=1, length=64))
    assert uses == [64, 64]


def test_experts_that_compute_something_else_are_left_alone(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = modeling_qwen3_moe.Qwen3MoeExperts.forward
    plain = real.__wrapped__ if hasattr(real, "__wrapped__") else real

    def limited(self: Any, hidden: Tensor, *args: Any) -> Any:
        """As many models limit what goes into a gate: seen for large tokens only."""
        return plain(self, hidden.clamp(-20, 20), *args)

    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeExperts, "forward", limited)
    expected = model.generate(prompt(), **GREEDY)
    fuse(model)
    assert replaced(model) == 0
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)


def test_copies_generate_the_same(model: Any, uses: list[int]) -> None:
    fuse(model)
    expected = model.generate(prompt(), **GREEDY)
    twin = copy.deepcopy(model)
    uses.clear()
    assert torch.equal(twin.generate(prompt(), **GREEDY), expected)
    assert uses == []  # its layers have not been arranged yet
    fuse(twin)
    assert torch.equal(twin.generate(prompt(), **GREEDY), expected)
    assert uses

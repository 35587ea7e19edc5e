"""Mixtures of experts: taken apart, folded with their routers, saved per expert, loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AwqConfig

import awq  # noqa: F401 (loads quantized checkpoints)
from awq.config import QuantConfig
from awq.model.blocks import BlockCall
from awq.model.experts import Experts, parts_of
from awq.model.layers import Structure
from awq.model.unfuse import empty_layers
from awq.pipeline.convert import write_plain
from awq.pipeline.observe import Batch, measure
from awq.pipeline.run import quantize

_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 2}
_LATENT = {
    "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
    "moe_intermediate_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip
_LINEAR = {
    "shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "head_dim": 16,
}  # fmt: skip
_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16}
# Family: its sizes, the layer of experts, the router, a tensor that must be in the result.
FAMILIES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "mixtral": (_LOCAL, "mlp.experts", "mlp.gate", "block_sparse_moe.experts.7.w2.qweight"),
    "qwen3_moe": (
        {**_MOE, "head_dim": 16, "mlp_only_layers": [0]},
        "mlp.experts",
        "mlp.gate",
        "mlp.experts.7.up_proj.qweight",
    ),
    "deepseek_v3": (_LATENT, "mlp.experts", "mlp.gate", "mlp.experts.7.gate_proj.qweight"),
    "qwen3_next": ({**_MOE, **_LINEAR}, "mlp.experts", "mlp.gate", "mlp.experts.7.down_proj.qweight"),
    # The checkpoint keeps these fused; engines want them apart.
    "granitemoe": (
        _LOCAL,
        "block_sparse_moe.experts",
        "block_sparse_moe.router",
        "block_sparse_moe.experts.7.down_proj.qweight",
    ),
    "llama4_text": (
        {**_LOCAL, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2},
        "feed_forward.experts",
        "feed_forward.router",
        "feed_forward.experts.7.down_proj.qweight",
    ),
    "gpt_oss": (_LOCAL, "mlp.experts", "mlp.router", "mlp.experts.7.gate_proj.qweight"),
}
EXACT = {"dtype": torch.float32, "quantization_config": AwqConfig(backend="torch")}


@pytest.fixture(scope="module")
def samples() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (64,) * 12 + (40, 17, 64)]


def saved(tiny: Any, family: str, folder: Path) -> Any:
    model = tiny(family, **FAMILIES[family][0])
    model.save_pretrained(folder)
    return model


def run(folder: Path, out: Path, samples: list[list[int]], **config: Any) -> Any:
    return quantize(
        folder, out, QuantConfig(**{"group_size": 32, **config}), samples, seq_len=64, device="cpu"
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_experts_are_quantized_apart_and_load_again(
    family: str, tiny: Any, samples: list[list[int]], tmp_path: Path
) -> None:
    _, experts, router, tensor = FAMILIES[family]
    saved(tiny, family, tmp_path / "model")
    report = run(tmp_path / "model", tmp_path / "out", samples)
    kind = report.plan.kinds[-1]
    assert all(fold["proved"] for fold in kind["folds"])
    consumers = [fold["consumers"] for fold in kind["folds"] if router in fold["consumers"]]
    assert len(consumers) == 1
    assert set(consumers[0]) >= {f"{experts}.{n}.{FIRST.get(family, 'gate_proj')}" for n in range(8)}
    assert router in kind["skipped"]
    outcome = report.blocks[-1].outcome
    assert outcome["error"] < outcome["errors"]["rtn"]
    if family != "llama4_text":  # there every expert runs on all tokens, most of them zero
        assert outcome["experts"][experts]["experts"] == 8
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert any(name.endswith(f"layers.1.{tensor}") for name in names)
    assert not any(name.endswith(("experts.down_proj", "output_linear.weight")) for name in names)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **EXACT)
    ids = torch.tensor(samples[:2])
    logits = loaded(ids).logits
    torch.testing.assert_close(logits, loaded.dequantize()(ids).logits, rtol=1e-4, atol=1e-4)


FIRST = {"mixtral": "w1"}


@pytest.mark.parametrize("family", ["granitemoe", "llama4_text", "gpt_oss"])
def test_experts_left_float_go_back_into_the_tensor_they_came_from(
    family: str, tiny: Any, samples: list[list[int]], tmp_path: Path
) -> None:
    saved(tiny, family, tmp_path / "model")
    report = run(
        tmp_path / "model", tmp_path / "out", samples, modules_to_not_convert=["experts.3"], method="rtn"
    )
    assert not any(".experts." in name for name in report.plan.quantized)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    fused = [name for name, tensor in before.items() if tensor.dim() == 3]
    assert fused
    assert all(torch.equal(after[name], before[name]) for name in fused)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", **EXACT)


@pytest.mark.parametrize("family", ["granitemoe", "llama4_text", "gpt_oss", "qwen3_moe", "mixtral"])
@torch.no_grad()
def test_a_folded_model_of_experts_keeps_its_output_where_nothing_is_clipped(
    family: str, tiny: Any, samples: list[list[int]], tmp_path: Path
) -> None:
    model = saved(tiny, family, tmp_path / "model")
    report = run(tmp_path / "model", tmp_path / "out", samples, format="folded", clip=False)
    assert report.blocks[1].outcome["scales"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    folded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor(samples[:4])
    expected = model(ids).logits
    assert (folded(ids).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", ["granitemoe", "llama4_text", "gpt_oss", "qwen3_moe"])
@torch.no_grad()
def test_plain_weights_of_quantized_experts_load_in_transformers_alone(
    family: str, tiny: Any, samples: list[list[int]], tmp_path: Path
) -> None:
    model = saved(tiny, family, tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", samples, method="rtn")
    write_plain(tmp_path / "out", tmp_path / "plain", torch.float32)
    kind = type(model)
    plain, told = kind.from_pretrained(tmp_path / "plain", dtype=torch.float32, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    quantized: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **EXACT)
    ids = torch.tensor(samples[:2])
    torch.testing.assert_close(plain(ids).logits, quantized(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_counts_in_no_experts_statistics(tiny: Any) -> None:
    model = tiny("qwen3_moe", **FAMILIES["qwen3_moe"][0])
    block = model.model.layers[1]
    parts = parts_of(block.mlp.experts)
    assert parts is not None
    fused = block.mlp.experts
    weights = {name: getattr(fused, name).data for name in parts}
    layers = empty_layers(fused, parts)
    for name, part in parts.items():
        for number, held in enumerate(layers):
            rows = weights[name][number].chunk(len(part.projections))
            for projection, weight in zip(part.projections, rows, strict=True):
                held[projection].weight = torch.nn.Parameter(weight)
    block.mlp.experts = Experts(fused, parts, layers)
    hidden = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    call = BlockCall((), {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(6)[None])})
    names = [f"mlp.experts.{n}.down_proj" for n in range(8)]
    structure = Structure({name: (name,) for name in names}, ())
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False

    def seen(batch: Batch) -> Any:
        return measure(block, structure, names, [batch], torch.device("cpu"), 32)

    padded = seen(Batch(hidden, call, mask))
    assert sum(padded.coverage["mlp.experts"].tokens) == 2 * int(mask.sum())
    hidden[1, 4:] = 100.0  # what padding holds must not matter; causal attention keeps it from the others
    other = seen(Batch(hidden, call, mask))
    for name in names:
        torch.testing.assert_close(padded.stats[name].gram, other.stats[name].gram)


def test_starved_experts_borrow_what_all_experts_saw(tiny: Any, tmp_path: Path) -> None:
    saved(tiny, "qwen3_moe", tmp_path / "model")
    notes: list[str] = []

    class Listener:
        def planned(self, plan: Any) -> None: ...
        def block_done(self, number: int, report: Any) -> None: ...
        def note(self, message: str) -> None:
            notes.append(message)

    report = quantize(
        tmp_path / "model", tmp_path / "out", QuantConfig(group_size=32), [[5, 6, 7, 8] * 12],
        seq_len=64, device="cpu", progress=Listener(),
    )  # fmt: skip
    seen = report.blocks[1].outcome["experts"]["mlp.experts"]
    assert seen["starved"] and seen["fewest_tokens"] < 32
    assert any("experts saw too few tokens" in note for note in notes)
    assert report.blocks[1].outcome["error"] <= report.blocks[1].outcome["errors"]["rtn"]

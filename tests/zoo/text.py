"""Architectures of text models: for each the changes that make transformers' configuration tiny.

Sizes divide by groups of 32 and by 8 rows, as the layouts want. Where an architecture has them, keys and
values have fewer heads than queries, windows are shorter than the probes, and blocks of every kind occur.
"""

from __future__ import annotations

import dataclasses
from typing import Any

# What most configurations call the same. Those that do not take no notice.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 128}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_SHARED = {"shared_expert_intermediate_size": 64}
# Latent attention: low-rank queries, keys and values, with rotary parts of their own.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
_DEEPSEEK: dict[str, Any] = {
    **_LATENT,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_mtp_layers": 0,
}
_DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_NO_HEAD_DIM = ("head_dim",)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A tiny model of one architecture.

    Args:
        model_type: transformers' name for it.
        changes: configuration entries that differ from `SIZES`.
        without: entries of `SIZES` that the configuration refuses.
        mixture: whether it has experts.
        fused: for experts that the hub keeps in two tensors: their names beside the experts, and how gate
            and up lie in the first (see `coverage.fuse`).
    """

    model_type: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    without: tuple[str, ...] = ()
    mixture: bool = False
    fused: tuple[str, str, str] | None = None

    def config(self) -> Any:
        """transformers' configuration of the tiny model."""
        from transformers import AutoConfig

        entries = {**SIZES, **self.changes}
        return AutoConfig.for_model(
            self.model_type, **{name: value for name, value in entries.items() if name not in self.without}
        )


TEXT: dict[str, Architecture] = {
    # Dense.
    "llama": Architecture("llama"),
    "mistral": Architecture("mistral"),
    "ministral3": Architecture("ministral3"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", {**_MIXED, "query_pre_attn_scalar": 16}),
    "gemma3": Architecture("gemma3_text", {**_MIXED, "query_pre_attn_scalar": 16}),
    "gemma4": Architecture(
        "gemma4_text",
        {
            **_MIXED,
            "global_head_dim": 32,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 128,
        },
    ),
    "gemma4 (shared keys and values)": Architecture(
        "gemma4_text",
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "global_head_dim": 32,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 128,
            "final_logit_softcapping": 30.0,
        },
    ),
    "phi": Architecture("phi", {"partial_rotary_factor": 0.5}),
    "phi3": Architecture("phi3"),
    "falcon": Architecture("falcon", {"ffn_hidden_size": 128, "bias": True}, without=_NO_HEAD_DIM),
    "falcon (new decoder)": Architecture(
        "falcon",
        {"ffn_hidden_size": 128, "new_decoder_architecture": True, "num_kv_heads": 2},
        without=_NO_HEAD_DIM,
    ),
    "falcon (ALiBi)": Architecture(
        "falcon",
        {"ffn_hidden_size": 128, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
        without=_NO_HEAD_DIM,
    ),
    "mpt": Architecture(
        "mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2}
    ),
    "bloom": Architecture("bloom", {"n_layer": 2, "n_head": 4}),
    "opt": Architecture("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gptj": Architecture("gptj", {**_GPT, "rotary_dim": 8}),
    "gpt_neox": Architecture("gpt_neox"),
    "gpt_bigcode": Architecture("gpt_bigcode", _GPT),
    "gpt2": Architecture("gpt2", _GPT),
    "starcoder2": Architecture("starcoder2"),
    "stablelm": Architecture("stablelm", {"partial_rotary_factor": 0.5}),
    "stablelm (parallel)": Architecture(
        "stablelm",
        {"partial_rotary_factor": 0.5, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "cohere": Architecture("cohere"),
    "cohere (qk norm)": Architecture("cohere", {"use_qk_norm": True}),
    "cohere2": Architecture("cohere2", _MIXED),
    "minicpm3": Architecture("minicpm3", {**_LATENT, "head_dim": 24, "dim_model_base": 64}),
    "olmo": Architecture("olmo"),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo3", _MIXED),
    "granite": Architecture(
        "granite",
        {
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "smollm3": Architecture("smollm3", {"num_hidden_layers": 4}),
    "glm4": Architecture("glm4", {"partial_rotary_factor": 0.5}),
    "exaone4": Architecture("exaone4", {**_MIXED, "sliding_window_pattern": 2}),
    "nemotron": Architecture("nemotron", {"partial_rotary_factor": 0.5}),
    "hunyuan_v1_dense": Architecture("hunyuan_v1_dense"),
    "ernie4_5": Architecture("ernie4_5"),
    "lfm2": Architecture(
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_bias": True},
    ),
    "seed_oss": Architecture("seed_oss"),
    "internlm3": Architecture("internlm3"),
    "qwen3_5": Architecture("qwen3_5_text", _DELTA),
    "mamba": Architecture("mamba", {"state_size": 16}),
    "falcon_h1": Architecture("falcon_h1", _MAMBA),
    "granitemoehybrid": Architecture(
        "granitemoehybrid",
        {
            **_MAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
        },
    ),
    "recurrent_gemma": Architecture(
        "recurrent_gemma", {"lru_width": 64, "block_types": ["recurrent", "attention"]}
    ),
    "apertus": Architecture("apertus"),
    "arcee": Architecture("arcee"),
    "biogpt": Architecture("biogpt"),
    "bitnet": Architecture("bitnet"),
    "cwm": Architecture("cwm"),
    "diffllama": Architecture("diffllama"),
    "doge": Architecture("doge"),
    "glm": Architecture("glm", {"partial_rotary_factor": 0.5}),
    "gpt_neox_japanese": Architecture("gpt_neox_japanese"),
    "helium": Architecture("helium"),
    "jais2": Architecture("jais2"),
    "ministral": Architecture("ministral", _MIXED),
    "nanochat": Architecture("nanochat"),
    "openai-gpt": Architecture("openai-gpt", _GPT),
    "persimmon": Architecture("persimmon", {"partial_rotary_factor": 0.5}),
    "vaultgemma": Architecture("vaultgemma", {**_MIXED, "query_pre_attn_scalar": 16}),
    # Mixtures of experts.
    "lfm2_moe": Architecture(
        "lfm2_moe",
        {**_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        mixture=True,
    ),
    "jamba": Architecture(
        "jamba",
        {
            **_EXPERTS,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        mixture=True,
    ),
    "llama4": Architecture(
        "llama4_text",
        {
            **_EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size": 64,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 8,
        },
        mixture=True,
        fused=("experts.gate_up_proj", "experts.down_proj", "columns"),
    ),
    "mixtral": Architecture("mixtral", {**_EXPERTS, "intermediate_size": 64}, mixture=True),
    "qwen2_moe": Architecture("qwen2_moe", {**_EXPERTS, **_SHARED, "mlp_only_layers": [0]}, mixture=True),
    "qwen3_moe": Architecture("qwen3_moe", {**_EXPERTS, "mlp_only_layers": [0]}, mixture=True),
    "qwen3_next": Architecture("qwen3_next", {**_EXPERTS, **_SHARED, **_DELTA}, mixture=True),
    "qwen3_5_moe": Architecture("qwen3_5_moe_text", {**_EXPERTS, **_SHARED, **_DELTA}, mixture=True),
    "phimoe": Architecture("phimoe", {**_EXPERTS, "intermediate_size": 64}, mixture=True),
    "deepseek_v2": Architecture("deepseek_v2", _DEEPSEEK, mixture=True),
    "deepseek_v3": Architecture("deepseek_v3", _DEEPSEEK, mixture=True),
    "olmoe": Architecture("olmoe", {**_EXPERTS, "intermediate_size": 64}, mixture=True),
    "granitemoe": Architecture(
        "granitemoe",
        {**_EXPERTS, "intermediate_size": 64},
        mixture=True,
        fused=("input_linear.weight", "output_linear.weight", "rows"),
    ),
    "glm4_moe": Architecture("glm4_moe", {**_DEEPSEEK, "n_group": 1, "num_key_value_heads": 2}, mixture=True),
    "hunyuan_v1_moe": Architecture(
        "hunyuan_v1_moe", {**_EXPERTS, "moe_topk": 2, "intermediate_size": 64}, mixture=True
    ),
    "ernie4_5_moe": Architecture(
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
        },
        mixture=True,
    ),
    "gpt_oss": Architecture(
        "gpt_oss",
        {**_EXPERTS, **_MIXED, "intermediate_size": 64},
        mixture=True,
        fused=("experts.gate_up_proj", "experts.down_proj", "alternating columns"),
    ),
}

"""Sizes of tiny mixtures of experts."""

from __future__ import annotations

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_key_value_heads": 4}
MIXTRAL = {"num_local_experts": 4, "num_key_value_heads": 2}
# DeepSeek's attention, and its experts.
LATENT = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
}  # fmt: skip

"""A random mixture of experts, with the shapes of a block of Qwen3-30B-A3B."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def write_random_experts(folder: Path, blocks: int) -> None:
    """Write a bfloat16 checkpoint: 600 million weights for each block, and a small vocabulary."""
    config = Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=8192,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)

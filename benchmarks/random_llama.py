"""Random Llama checkpoints of any depth, written block by block: making one never needs the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig


def write_random_llama(folder: Path, config: LlamaConfig) -> int:
    """Write a bfloat16 checkpoint of random weights, one shard for each block.

    Returns:
        Weights of one block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = "bfloat16"
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        save_file({name: _random(shape, generator) for name, shape in shapes.items()}, folder / file)
        weight_map.update(dict.fromkeys(shapes, file))

    block = _block_shapes(config)
    for number in range(config.num_hidden_layers):
        names = {f"model.layers.{number}.{name}": shape for name, shape in block.items()}
        write(f"model-{number + 1:05d}.safetensors", names)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    around = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        around["lm_head.weight"] = (vocabulary, hidden)
    write("model-00000.safetensors", around)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(torch.Size(shape).numel() for shape in block.values())


def _block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    hidden, wide = config.hidden_size, config.intermediate_size
    size = config.head_dim or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    return {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    value = 1 + 0.1 * noise if len(shape) == 1 else noise / shape[1] ** 0.5
    return value.to(torch.bfloat16)

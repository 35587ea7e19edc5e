"""Tiny vision-language models from transformers' own configuration classes, saved to a folder.

Every linear layer of the text decoders divides by groups of 32. Norms are uneven, so that a wrong fold shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zoo.build import lively

VOCABULARY = 160
IMAGE, VIDEO, VISION_START, VISION_END, AUDIO = 151, 152, 153, 154, 155
# Sizes of the text decoders.
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Sizes of the vision towers: four patches of 4 x 4 pixels along each side.
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def save(folder: Path, model_type: str, **config: Any) -> Path:
    """Make the model of a configuration, with lively weights, and save it.

    Args:
        folder: where to.
        model_type: transformers' name of the architecture.
        **config: of the configuration class.
    """
    from transformers import AutoConfig

    from awq.model.classes import auto_class

    torch.manual_seed(0)
    made = AutoConfig.for_model(model_type, **config)
    model = auto_class(made).from_config(made, dtype=torch.float32).eval()
    lively(model)
    model.save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    """CLIP and Llama."""
    return save(
        folder,
        "llava",
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        image_token_index=IMAGE,
    )


def llava_next(folder: Path) -> Path:
    """LLaVA with tiles and a learned end of line."""
    return save(
        folder,
        "llava_next",
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )


def llava_onevision(folder: Path) -> Path:
    """SigLIP and Qwen2."""
    return save(
        folder,
        "llava_onevision",
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        vision_feature_layer=-1,
    )


def qwen2_vl(folder: Path) -> Path:
    """Images of any size, and rotary positions in three dimensions."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
    return save(
        folder,
        "qwen2_vl",
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        **_QWEN_TOKENS,
    )


def qwen2_5_vl(folder: Path) -> Path:
    """Attention in windows inside the tower."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return save(
        folder,
        "qwen2_5_vl",
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        **_QWEN_TOKENS,
    )


def qwen3_vl(folder: Path) -> Path:
    """Visual features are added to the hidden states behind the first two decoder blocks."""
    return save(folder, "qwen3_vl", **_qwen3(num_hidden_layers=3))


def _qwen3(**text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [3, 3, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    sizes = {**TEXT, "head_dim": 16, "rope_parameters": rope, **text}
    return {"text_config": sizes, "vision_config": vision, **_QWEN_TOKENS}


def gemma3(folder: Path) -> Path:
    """Norms that apply 1 + w, local and global attention, both ways among the tokens of an image."""
    return save(
        folder,
        "gemma3",
        text_config={**TEXT, "head_dim": 16, "sliding_window": 32, "layer_types": _LOCAL_AND_GLOBAL},
        vision_config={**TOWER, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )


_LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"]


def mistral3(folder: Path) -> Path:
    """Pixtral's tower and Mistral."""
    return save(
        folder,
        "mistral3",
        text_config={**TEXT, "model_type": "mistral", "head_dim": 16},
        vision_config={**TOWER, "model_type": "pixtral", "head_dim": 16},
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )


def internvl(folder: Path) -> Path:
    """Pixels shuffled into channels."""
    return save(
        folder,
        "internvl",
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=IMAGE,
    )


def smolvlm(folder: Path) -> Path:
    """Idefics 3 with images cut in tiles."""
    return save(folder, "smolvlm", **_IDEFICS)


def idefics3(folder: Path) -> Path:
    """SigLIP and Llama."""
    return save(folder, "idefics3", **_IDEFICS)


_IDEFICS: dict[str, Any] = {
    "text_config": {**TEXT, "model_type": "llama"},
    "vision_config": TOWER,
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": 0,
}


def paligemma(folder: Path) -> Path:
    """SigLIP and Gemma."""
    return save(
        folder,
        "paligemma",
        text_config={**TEXT, "model_type": "gemma", "head_dim": 16},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE,
        projection_dim=64,
    )


def aya_vision(folder: Path) -> Path:
    """SigLIP and Cohere 2: attention and MLP side by side behind one norm."""
    return save(
        folder,
        "aya_vision",
        text_config={**TEXT, "model_type": "cohere2", "head_dim": 16, "layer_types": _LOCAL_AND_GLOBAL},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE,
        adapter_layer_norm_eps=1e-6,
    )


def glm4v(folder: Path) -> Path:
    """Gate and up in one layer, four norms a block."""
    rope = {
        "rope_type": "default",
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
        "rope_theta": 1e4,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "image_size": 16,
    }
    return save(
        folder,
        "glm4v",
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=156,
        video_end_token_id=157,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def ovis2(folder: Path) -> Path:
    """Images as a mixture of a visual vocabulary."""
    return save(
        folder,
        "ovis2",
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**TOWER, "hidden_stride": 1, "num_visual_indicator_tokens": 5, "vocab_size": 64},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[153, 154, 155, 156, 157],
        hidden_size=64,
        vocab_size=VOCABULARY,
    )


def gemma3n_text(folder: Path) -> Path:
    """Four streams of hidden states, inputs for each layer, keys and values shared by the last layers.

    The text decoder alone: the tower of the whole model wants the package timm.
    """
    sizes = {
        **TEXT,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "num_kv_shared_layers": 2,
        "layer_types": _LOCAL_AND_GLOBAL * 2,
        "sliding_window": 32,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 32,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    return save(folder, "gemma3n_text", **sizes)


def gemma4(folder: Path) -> Path:
    """Inputs for each layer, keys and values shared by the last layers."""
    return save(
        folder,
        "gemma4",
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_kv_shared_layers": 2,
            "layer_types": _LOCAL_AND_GLOBAL * 2,
            "sliding_window": 32,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        vision_config={**TOWER, "head_dim": 16, "num_key_value_heads": 2},
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
    )


def cohere2_vision(folder: Path) -> Path:
    """SigLIP and Cohere 2 with another projector."""
    return save(
        folder,
        "cohere2_vision",
        text_config={**TEXT, "model_type": "cohere2", "head_dim": 16, "layer_types": _LOCAL_AND_GLOBAL},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )


# Experts of the mixtures: four, of which a token goes to two.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def qwen3_vl_moe(folder: Path) -> Path:
    """Qwen3-VL with a mixture of experts."""
    return save(folder, "qwen3_vl_moe", **_qwen3(num_hidden_layers=3, **_EXPERTS))


def qwen3_5(folder: Path) -> Path:
    """Linear attention and full attention in turns."""
    config = _qwen3(
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    del config["vision_config"]["deepstack_visual_indexes"]
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    config["text_config"]["rope_parameters"] = {**rope, "partial_rotary_factor": 0.25}
    return save(folder, "qwen3_5", **config)


def llama4(folder: Path) -> Path:
    """Experts for every token, transposed in the checkpoint."""
    text = {
        **TEXT,
        "head_dim": 16,
        "intermediate_size_mlp": 128,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "layer_types": ["chunked_attention", "full_attention"],
    }
    vision = {**TOWER, "intermediate_size": 128, "pixel_shuffle_ratio": 0.5}
    vision |= {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
    return save(
        folder,
        "llama4",
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )


BUILDERS: dict[str, Callable[[Path], Path]] = {
    build.__name__: build
    for build in (
        llava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        gemma3,
        mistral3,
        internvl,
        smolvlm,
        idefics3,
        paligemma,
        aya_vision,
        glm4v,
        ovis2,
        gemma3n_text,
        gemma4,
        cohere2_vision,
        qwen3_vl_moe,
        qwen3_5,
        llama4,
    )
}


# How the hub fuses experts: see `zoo.text.Architecture`.
FUSED = {
    "qwen3_vl_moe": ("experts.gate_up_proj", "experts.down_proj", "rows"),
    "llama4": ("experts.gate_up_proj", "experts.down_proj", "columns"),
}


def _ids(count: int) -> torch.Tensor:
    """A few tokens of text, with those of an image among them."""
    return torch.tensor([[5, 6, 7, *[IMAGE] * count, 8, 9, 10, 11]])


def _types(count: int) -> torch.Tensor:
    return (_ids(count) == IMAGE).int()


def image_inputs(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a processor of the architecture might return for a text with a small image."""
    generator = torch.Generator().manual_seed(seed)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    one, tiles = pixels(1, 3, 16, 16), pixels(1, 3, 3, 16, 16)
    wide, square = torch.tensor([[16, 32]]), torch.tensor([[16, 16]])
    # Patches of 3 channels, 2 moments and 4 x 4 pixels, two by two of which make a token.
    patches, grid = pixels(24, 96), torch.tensor([[1, 4, 6]])
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).unsqueeze(0)
    qwen = {"input_ids": _ids(6), "pixel_values": patches, "image_grid_thw": grid}
    qwen |= {"mm_token_type_ids": _types(6)}
    known: dict[str, dict[str, torch.Tensor]] = {
        "llava": {"input_ids": _ids(16), "pixel_values": one},
        "llava_next": {"input_ids": _ids(52), "pixel_values": tiles, "image_sizes": wide},
        "llava_onevision": {"input_ids": _ids(52), "pixel_values": tiles, "image_sizes": wide},
        "qwen2_vl": qwen,
        "qwen2_5_vl": qwen,
        "qwen3_vl": qwen,
        "glm4v": qwen,
        "qwen3_vl_moe": qwen,
        "qwen3_5": qwen,
        "llama4": {"input_ids": _ids(4), "pixel_values": one},
        "cohere2_vision": {"input_ids": _ids(4), "pixel_values": one},
        "gemma3": {"input_ids": _ids(4), "pixel_values": one, "token_type_ids": _types(4)},
        "mistral3": {"input_ids": _ids(4), "pixel_values": one, "image_sizes": square},
        "internvl": {"input_ids": _ids(4), "pixel_values": one},
        "smolvlm": {"input_ids": _ids(12), "pixel_values": tiles},
        "idefics3": {"input_ids": _ids(12), "pixel_values": tiles},
        "paligemma": {"input_ids": _ids(16), "pixel_values": one},
        "aya_vision": {"input_ids": _ids(4), "pixel_values": one},
        "ovis2": {"input_ids": torch.tensor([[5, 153, *[IMAGE] * 16, 154, 8, 9]]), "pixel_values": one},
        "gemma4": {
            "input_ids": _ids(4),
            "pixel_values": pixels(1, 36, 48),
            "image_position_ids": places,
            "mm_token_type_ids": _types(4),
        },
    }
    return known[name]

"""Processors for the tiny vision-language models: transformers' own, with a tokenizer of characters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zoo.vision import IMAGE, VIDEO, VISION_END, VISION_START

# Every message begins with the role; images are one mark each, which the processor makes many of.
_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}MARK{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %};{% endfor %}"
)


def tokenizer(special: dict[str, int], **named: str) -> Any:
    """A tokenizer of ASCII characters.

    Args:
        special: tokens of several characters, with their ids.
        **named: attributes of the tokenizer that name some of them (`image_token="<image>"`).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = ["<pad>", "<s>", "</s>", "<unk>", "\n", *map(chr, range(32, 127))]
    vocabulary = {token: number for number, token in enumerate(plain)} | special
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=named or list(special),
    )


def _llava() -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images,
        tokenizer({"<image>": IMAGE}, image_token="<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("MARK", "<image>"),
    )


def _qwen2_vl() -> Any:
    from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

    images = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    special = {
        "<|image_pad|>": IMAGE,
        "<|video_pad|>": VIDEO,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
    }
    mark = "<|vision_start|><|image_pad|><|vision_end|>"

    class WithoutVideos(Qwen2VLProcessor):
        """Takes None for the part that prepares videos, which wants torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            checked = super().check_argument_for_proper_class
            return None if argument is None else checked(argument_name, argument)

    return WithoutVideos(images, tokenizer(special), chat_template=_TEMPLATE.replace("MARK", mark))


def _gemma3() -> Any:
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor

    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    special = {"<image_soft_token>": IMAGE, "<start_of_image>": VISION_START, "<end_of_image>": VISION_END}
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    return Gemma3Processor(
        images,
        tokenizer(special, **named),
        image_seq_length=4,
        chat_template=_TEMPLATE.replace("MARK", "<start_of_image>"),
    )


def _idefics3() -> Any:
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    special = {"<image>": IMAGE, "<fake_token_around_image>": VISION_START, "<end_of_utterance>": VISION_END}
    tiles = {f"<row_{row}_col_{col}>": 101 + 7 * row + col for row in range(1, 7) for col in range(1, 7)}
    return Idefics3Processor(
        images,
        tokenizer({**special, "<global-img>": 150, **tiles}),
        image_seq_len=4,
        chat_template=_TEMPLATE.replace("MARK", "<image>"),
    )


# SmolVLM's own processor wants torchvision and num2words; for images it does what that of Idefics 3 does.
PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_vl,
    "qwen3_vl": _qwen2_vl,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
}


def processor_of(name: str) -> Any:
    """The processor of an architecture; a test that needs it is skipped where a package for it is missing."""
    try:
        return PROCESSORS[name]()
    except ImportError as error:  # some releases of transformers want torchvision
        pytest.skip(" ".join(str(error).split()))


def add_processor(folder: Path, name: str) -> Any:
    """Save the processor of an architecture to a model folder, and return it."""
    processor = processor_of(name)
    processor.save_pretrained(folder)
    return processor


def picture(width: int, height: int, seed: int = 0) -> Any:
    """A picture of noise."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chat(image: Any, text: str = "What is it?", answer: str = "A cat.") -> list[dict[str, Any]]:
    """A conversation about a picture (opened, or the path of one)."""
    part = {"type": "image", "path": str(image)} if isinstance(image, (str, Path)) else {"type": "image"}
    if "path" not in part:
        part["image"] = image
    return [
        {"role": "user", "content": [part, {"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]

"""What the dry pass notes is what the model does, images and all; what cannot be noted is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.errors import StructureError
from awq.model import Skeleton, dry_pass, find_blocks, open_model
from zoo.vision import BUILDERS, image_inputs

CPU = torch.device("cpu")
TEXT = {"input_ids": torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))}


@torch.no_grad()
def streamed(skeleton: Skeleton, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states, behind the final norm, when blocks run one by one."""
    name, blocks = find_blocks(skeleton.model)
    (item,) = dry_pass(skeleton, name, [inputs], CPU)
    hidden = item.hidden
    for index, block in enumerate(blocks):
        skeleton.load(block, f"{name}.{index}", CPU)
        hidden = item.calls[index].run(block, hidden, keep=True)
        skeleton.unload(block)
    path = name.replace(".layers", ".norm")
    norm = skeleton.model.get_submodule(path)
    skeleton.load(norm, path, CPU)
    return norm(hidden)


@torch.no_grad()
def whole(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The same from the model as a whole."""
    from awq.hf import load_float

    model = load_float(folder, dtype=torch.float32)
    return model(**inputs, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("name", [name for name in BUILDERS if not name.endswith("_text")])
def test_blocks_run_one_by_one_see_the_image_as_the_model_does(name: str, tmp_path: Path) -> None:
    inputs = image_inputs(name)
    expected = whole(BUILDERS[name](tmp_path), inputs)
    skeleton = open_model(tmp_path)
    torch.testing.assert_close(streamed(skeleton, inputs), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape[:2] == inputs["input_ids"].shape


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma4"])
def test_blocks_run_one_by_one_on_text_give_what_the_model_gives(name: str, tmp_path: Path) -> None:
    expected = whole(BUILDERS[name](tmp_path), TEXT)
    torch.testing.assert_close(streamed(open_model(tmp_path), TEXT), expected, rtol=1e-4, atol=1e-5)


def test_features_added_between_blocks_are_noted_where_they_are(tmp_path: Path) -> None:
    skeleton = open_model(BUILDERS["qwen3_vl"](tmp_path))
    name, _ = find_blocks(skeleton.model)
    inputs = image_inputs("qwen3_vl")
    with_image, text = dry_pass(skeleton, name, [inputs, TEXT], CPU)
    image = (inputs["input_ids"][0] == 151).nonzero().squeeze(1)
    assert [call.added is not None for call in with_image.calls] == [False, True, True]
    assert all(torch.equal(call.added.rows, image) for call in with_image.calls[1:] if call.added)
    assert not any(call.added for call in text.calls)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the tensors that are read."""
    from awq.model import CheckpointReader

    seen: set[str] = set()
    stock = CheckpointReader.read

    def noting(self: CheckpointReader, keys: Any) -> Iterator[tuple[str, Tensor]]:
        seen.update(keys)
        return stock(self, keys)

    monkeypatch.setattr(CheckpointReader, "read", noting)
    return seen


@pytest.mark.parametrize("images", [False, True])
def test_the_tower_is_read_for_images_alone_and_let_go(images: bool, tmp_path: Path, read: set[str]) -> None:
    skeleton = open_model(BUILDERS["llava_next"](tmp_path))
    name, _ = find_blocks(skeleton.model)
    dry_pass(skeleton, name, [image_inputs("llava_next") if images else TEXT], CPU)
    assert any("vision_tower" in key for key in read) == images
    assert any("projector" in key for key in read) == images
    assert any("embed_tokens" in key for key in read)
    assert not any((".layers." in key and "vision" not in key) or "lm_head" in key for key in read)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_a_model_that_asks_where_weights_are_before_they_are_read_gets_them_first(
    tiny: Any, tmp_path: Path
) -> None:
    """Llama 4 sends tokens to where its embeddings lie; from nowhere arbitrary memory would come back."""
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2}
    model = tiny("llama4_text", **sizes)
    model.save_pretrained(tmp_path)
    skeleton = open_model(tmp_path)
    (item,) = dry_pass(skeleton, find_blocks(skeleton.model)[0], [TEXT], CPU)
    torch.testing.assert_close(item.hidden, model.model.embed_tokens(TEXT["input_ids"]).detach())


# Decoders that do between their blocks what cannot be replayed.


class _Answers(torch.nn.Module):
    """A text decoder whose loop over the blocks is written in the test."""

    def __init__(self, model: Any, loop: Any) -> None:
        super().__init__()
        self.inner, self.loop = model, loop

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        inner = self.inner
        hidden = inner.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1]).unsqueeze(0)
        rotary = inner.rotary_emb(hidden, places)
        return self.loop(inner.layers, hidden, {"position_embeddings": rotary})


def _with_loop(tiny: Any, folder: Path, loop: Any) -> Skeleton:
    tiny("llama", num_key_value_heads=2, num_hidden_layers=3).save_pretrained(folder)
    skeleton = open_model(folder)
    model: Any = skeleton.model
    inner = model.model
    model.forward = _Answers(inner, loop).forward
    return skeleton


def _scaled(layers: Any, hidden: Tensor, more: dict[str, Any]) -> None:
    for layer in layers:
        hidden = layer(hidden, **more) * 1.5


def _remembering(layers: Any, hidden: Tensor, more: dict[str, Any]) -> None:
    first = None
    for layer in layers:
        hidden = layer(hidden, **more, **({} if first is None else {"first": first}))
        first = hidden if first is None else first


def _backwards(layers: Any, hidden: Tensor, more: dict[str, Any]) -> None:
    for layer in [layers[1], layers[0], layers[2]]:
        hidden = layer(hidden, **more)


def _sharing_an_object(layers: Any, hidden: Tensor, more: dict[str, Any]) -> None:
    class Memory:
        pass

    memory = Memory()
    for layer in layers:
        hidden = layer(hidden, **more, memory=memory)


def _passing_over(layers: Any, hidden: Tensor, more: dict[str, Any]) -> None:
    """Llama 3.2's blocks for images do not run on text."""
    for layer in (layers[0], layers[2]):
        hidden = layer(hidden, **more)


def _running_thrice(layers: Any, hidden: Tensor, more: dict[str, Any]) -> None:
    for layer in [*list(layers)[:2], *list(layers)[:2], layers[2]]:
        hidden = layer(hidden, **more)


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        (_scaled, "LlamaForCausalLM changes the hidden states between block 0 and block 1 of"),
        (_remembering, r"block 1 of LlamaForCausalLM is given an argument \(first\) that depends on"),
        (_backwards, r"blocks were called in the order \[1, 0, 2\]"),
        (_sharing_an_object, r"blocks 0 and 1 of LlamaForCausalLM share an object \(Memory\)"),
        (_passing_over, "block 1 does not run on every input"),
        (_running_thrice, r"blocks were called in the order \[0, 1, 0, 1, 2\]"),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_name(loop: Any, words: str, tiny: Any, tmp_path: Path) -> None:
    skeleton = _with_loop(tiny, tmp_path, loop)
    with pytest.raises(StructureError, match=words):
        dry_pass(skeleton, find_blocks(skeleton.model)[0], [TEXT], CPU)


def test_a_constant_added_between_blocks_is_replayed(tiny: Any, tmp_path: Path) -> None:
    def shifted(layers: Any, hidden: Tensor, more: dict[str, Any]) -> None:
        for number, layer in enumerate(layers):
            hidden = layer(hidden, **more) + number / 4

    skeleton = _with_loop(tiny, tmp_path, shifted)
    (item,) = dry_pass(skeleton, find_blocks(skeleton.model)[0], [TEXT], CPU)
    added = [None if call.added is None else call.added.values.unique().tolist() for call in item.calls]
    assert added == [None, None, [0.25]]


def test_an_input_that_the_model_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    skeleton = open_model(BUILDERS["llava"](tmp_path))
    inputs = image_inputs("llava")
    inputs["input_ids"] = inputs["input_ids"][:, 4:]
    with pytest.raises(StructureError, match=r"cannot be run on the calibration data: .*do not match"):
        dry_pass(skeleton, find_blocks(skeleton.model)[0], [inputs], CPU)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64}
    tower = {"depths": [1], "embed_dim": [32], "num_heads": [2], "num_groups": [2], "window_size": 2}
    tower |= {"patch_size": [4], "patch_stride": [4], "patch_padding": [1], "patch_prenorm": [False]}
    config = AutoConfig.for_model(
        "florence2",
        text_config={"model_type": "bart", **sizes},
        vision_config={**tower, "projection_dim": 32},
    )
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(StructureError, match="is an encoder with a decoder"):
        open_model(tmp_path)

"""The commands on a vision-language model, with images named in a file of chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import awq as openawq
from zoo.processors import add_processor, chat, picture
from zoo.vision import llava

pytest.importorskip("PIL", reason="processors of images need Pillow")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its processor, and a file of chats with two images of unlike sizes."""
    folder = llava(tmp_path_factory.mktemp("llava") / "model")
    add_processor(folder, "llava")
    rows = []
    for number, size in enumerate(((20, 30), (64, 16))):
        picture(*size, seed=number).save(folder.parent / f"{number}.png")
        rows.append({"messages": chat(f"{number}.png", "What is in the picture?" * (number + 1))})
    rows.append({"messages": [{"role": "user", "content": "A question without a picture."}]})
    (folder.parent / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    """The same, quantized on text."""
    out = model.parent / "out"
    openawq.quantize(model, out, openawq.QuantConfig(group_size=32, scale_steps=3), [[5, 6, 7, 8] * 9])
    return out


def test_a_file_of_chats_with_images_calibrates(model: Path, awq: Any, tmp_path: Path) -> None:
    calib = model.parent / "chats.jsonl"
    done = awq("quantize", model, tmp_path / "out", "--group-size", 32, "--calib", calib, "--json", "-")
    assert done.code == 0, done.err
    plan = done.json["plan"]
    assert plan["calibration"].startswith("3 samples of up to")
    assert "(2 inputs with images)" in plan["calibration"]
    assert plan["architecture"] == "LlavaForConditionalGeneration"


def test_the_processor_comes_along(model: Path, quantized: Path) -> None:
    from transformers import AutoProcessor

    inputs = [
        AutoProcessor.from_pretrained(folder)(text="a <image>", images=picture(9, 12))
        for folder in (model, quantized)
    ]
    assert inputs[0]["input_ids"] == inputs[1]["input_ids"]
    assert (inputs[0]["pixel_values"][0] == inputs[1]["pixel_values"][0]).all()
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (quantized / name).read_bytes() == (model / name).read_bytes()


def test_inspecting_shows_the_text_decoder(model: Path, quantized: Path, awq: Any) -> None:
    shown = awq("inspect", model, "--group-size", "32").out
    assert "LlavaForConditionalGeneration, 2 blocks in model.language_model.layers" in shown
    assert "vision_tower.encoder.layers.*.mlp.fc1 (x 2)" in shown
    shown = awq("inspect", quantized).out
    assert "vision_tower" in shown and "14" in shown


def test_evaluating_and_generating_run_the_whole_model_on_text(
    model: Path, quantized: Path, awq: Any, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm, and the wind had gone. " * 4)
    done = awq("eval", quantized, "--against", model, "--text", text, "--window", 32, "--json", "-")
    assert done.code == 0, done.err
    assert 0 <= done.json["kl"] < 1
    done = awq("generate", quantized, "--prompt", "The sea", "--max-new-tokens", "3")
    assert done.code == 0, done.err


def test_a_missing_image_is_told_before_any_work(model: Path, awq: Any, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat("gone.png")}))
    done = awq("quantize", model, tmp_path / "out", "--calib", tmp_path / "chats.jsonl")
    assert done.code == 1
    assert "gone.png, which does not exist" in done.err
    assert not (tmp_path / "out").exists()


def test_images_for_a_model_without_a_processor_are_told(books6m: Path, awq: Any, tmp_path: Path) -> None:
    picture(9, 9).save(tmp_path / "a.png")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat("a.png")}))
    done = awq("quantize", books6m, tmp_path / "out", "--calib", tmp_path / "chats.jsonl")
    assert done.code == 1
    assert "has no processor" in done.err

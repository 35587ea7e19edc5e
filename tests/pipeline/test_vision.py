"""Vision-language models end to end: the text decoder's blocks are quantized, all else stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import awq
from awq.errors import AwqError
from awq.evaluate import compare
from awq.hf import load_float, load_quantized
from awq.model.quantized import QuantizedCheckpoint
from awq.pipeline.kinds import discover_kind
from awq.pipeline.report import Silent
from zoo.vision import BUILDERS, image_inputs

QUICK: dict[str, Any] = {"group_size": 32, "scale_steps": 4, "rounding": "nearest"}
WHOLE = [name for name in BUILDERS if not name.endswith("_text")]
# What is named as a whole in modules_to_not_convert, without `model.` in front.
BRANCHES = {
    **{name: {"vision_tower", "multi_modal_projector"} for name in WHOLE},
    **{name: {"visual"} for name in WHOLE if "qwen" in name or name == "glm4v"},
    **{name: {"vision_model", "connector"} for name in ("smolvlm", "idefics3")},
    "ovis2": {"vision_tower"},
    "gemma4": {"vision_tower", "embed_vision"},
    "llama4": {"vision_model", "multi_modal_projector"},
}


def texts(count: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 150, (n,), generator=generator).tolist() for n in (40, 23, 31)[:count]]


def mixed(name: str) -> list[Any]:
    """Text, and two inputs with images."""
    return [*texts(), image_inputs(name, 1), image_inputs(name, 2)]


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    return model(**image_inputs(name, 9)).logits


def dequantized(quantized: Path, folder: Path) -> Path:
    """The checkpoint that a quantized one stands for, as plain weights."""
    checkpoint = QuantizedCheckpoint(quantized)
    tensors: dict[str, Tensor] = {}
    for file in checkpoint.reader.files:
        for key, tensor in load_file(quantized / file).items():
            layer, _, leaf = key.rpartition(".")
            if layer not in checkpoint.layers or leaf == "bias":
                tensors[key] = tensor
            else:
                tensors[f"{layer}.weight"] = checkpoint.weight(layer).dequantize()
    shutil.copytree(quantized, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", WHOLE)
def test_an_architecture_is_quantized_on_text_and_images(name: str, tmp_path: Path) -> None:
    model, out = BUILDERS[name](tmp_path / "model"), tmp_path / "out"
    report = awq.quantize(model, out, awq.QuantConfig(**QUICK), mixed(name), batch_tokens=64)
    loaded = load_quantized(out, dtype=torch.float32, kernel="torch")
    assert type(loaded).__name__ == json.loads((model / "config.json").read_text())["architectures"][0]
    if any(".experts." in layer for layer in report.plan.quantized):
        # Experts apart are no names of plain weights: the layout that writes the values keeps them fused.
        config = awq.QuantConfig(**QUICK, format="float")
        awq.quantize(model, tmp_path / "plain", config, mixed(name), batch_tokens=64)
        plain = tmp_path / "plain"
    else:
        plain = dequantized(out, tmp_path / "plain")
    expected = logits(load_float(plain, dtype=torch.float32), name)
    torch.testing.assert_close(logits(loaded, name), expected, rtol=1e-4, atol=1e-4)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    (decoder,) = {layer.rpartition(".layers.")[0] for layer in report.plan.quantized}
    assert "vis" not in decoder
    outside = {key for key in before if not key.startswith(f"{decoder}.layers.")}
    assert any("vis" in key for key in outside)
    assert all(torch.equal(before[key], after[key]) for key in outside)
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert set(skipped) >= BRANCHES[name] | {f"model.{branch}" for branch in BRANCHES[name]}
    assert not any(part in layer for part in skipped for layer in report.plan.quantized)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "gemma4", "glm4v", "smolvlm"])
def test_folding_leaves_what_the_model_says_of_an_image_as_it_was(name: str, tmp_path: Path) -> None:
    model, out = BUILDERS[name](tmp_path / "model"), tmp_path / "out"
    config = awq.QuantConfig(**QUICK, format="folded", clip=False)
    report = awq.quantize(model, out, config, mixed(name))
    assert any(scale != "identity" for block in report.blocks for scale in block.outcome["scales"].values())
    before = logits(load_float(model, dtype=torch.float32), name)
    after = logits(load_float(out, dtype=torch.float32), name)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4


def test_text_alone_quantizes_a_vision_language_model(tmp_path: Path) -> None:
    model, out = BUILDERS["qwen2_vl"](tmp_path / "model"), tmp_path / "out"
    report = awq.quantize(model, out, awq.QuantConfig(**QUICK), texts())
    assert "with images" not in report.plan.calibration
    loaded = load_quantized(out, dtype=torch.float32, kernel="torch")
    expected = logits(load_float(dequantized(out, tmp_path / "plain"), dtype=torch.float32), "qwen2_vl")
    torch.testing.assert_close(logits(loaded, "qwen2_vl"), expected, rtol=1e-4, atol=1e-4)


def test_images_change_what_is_chosen(tmp_path: Path) -> None:
    """Their tokens are in the statistics: the same text with other pixels gives other codes."""
    model = BUILDERS["qwen3_vl"](tmp_path / "model")
    found = []
    for seed in (1, 1, 2):
        out = tmp_path / f"out{len(found)}"
        awq.quantize(model, out, awq.QuantConfig(**QUICK), [*texts(1), image_inputs("qwen3_vl", seed)])
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_padded_rows_of_an_input_count_in_nothing(tmp_path: Path) -> None:
    """A processor pads conversations of unlike length: what stands at the padding must not matter."""
    model = BUILDERS["llava"](tmp_path / "model")
    one = image_inputs("llava", 1)
    ids = torch.cat([one["input_ids"], one["input_ids"]])
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    found = []
    for filler in (7, 90):
        padded = ids.clone()
        padded[mask == 0] = filler
        pixels = one["pixel_values"].repeat(2, 1, 1, 1)
        inputs = {"input_ids": padded, "attention_mask": mask, "pixel_values": pixels}
        out = tmp_path / f"out{filler}"
        report = awq.quantize(model, out, awq.QuantConfig(**QUICK), [*texts(1), inputs])
        assert f"{40 + int(mask.sum())} tokens in all" in report.plan.calibration
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


class _Stopping(Silent):
    """Ends a run behind a block."""

    def __init__(self, block: int) -> None:
        self.block = block

    def block_done(self, index: int, report: Any) -> None:
        if index == self.block:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["gemma4", "qwen3_vl"])
def test_an_interrupted_run_goes_on_with_what_blocks_handed_over(name: str, tmp_path: Path) -> None:
    """Keys and values that later blocks borrow, and features added between blocks, survive a kill."""
    model = BUILDERS[name](tmp_path / "model")
    config, calib = awq.QuantConfig(**QUICK), mixed(name)
    awq.quantize(model, tmp_path / "whole", config, calib)
    with pytest.raises(KeyboardInterrupt):
        awq.quantize(model, tmp_path / "out", config, calib, progress=_Stopping(1))
    report = awq.quantize(model, tmp_path / "out", config, calib)
    assert report.plan.resumed_at == 2
    for file in ("model.safetensors", "config.json", "awq_report.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_a_run_does_not_go_on_with_other_images(tmp_path: Path) -> None:
    model = BUILDERS["llava"](tmp_path / "model")
    config = awq.QuantConfig(**QUICK)
    with pytest.raises(KeyboardInterrupt):
        awq.quantize(model, tmp_path / "out", config, mixed("llava"), progress=_Stopping(0))
    other = [*texts(), image_inputs("llava", 1), image_inputs("llava", 3)]
    with pytest.raises(AwqError, match=r"other settings .*calibration"):
        awq.quantize(model, tmp_path / "out", config, other)


def test_the_text_decoder_of_gemma_3n_is_quantized(tmp_path: Path) -> None:
    """Its hidden states have four streams, and its last blocks borrow keys and values."""
    model, out = BUILDERS["gemma3n_text"](tmp_path / "model"), tmp_path / "out"
    awq.quantize(model, out, awq.QuantConfig(**QUICK), texts())
    ids = torch.tensor(texts(1))
    loaded = load_quantized(out, dtype=torch.float32, kernel="torch")
    plain = load_float(dequantized(out, tmp_path / "plain"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


class _ForImagesToo(torch.nn.Module):
    """A block with a layer that text never reaches, reading what the others read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(64)
        self.text, self.image = torch.nn.Linear(64, 64), torch.nn.Linear(width, 64)
        self.images = False

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        more = self.image(normed) if self.images else 0
        return hidden + self.text(normed) + more


@pytest.mark.parametrize(
    ("images", "width", "proved"), [(False, 64, False), (True, 64, True), (False, 32, True)]
)
@torch.no_grad()
def test_nothing_is_folded_that_a_layer_which_did_not_run_may_read(
    images: bool, width: int, proved: bool
) -> None:
    torch.manual_seed(0)
    block = _ForImagesToo(width)
    block.images = images
    long, single = torch.randn(2, 24, 64), torch.randn(16, 1, 64)
    config = awq.QuantConfig(**QUICK)
    kind = discover_kind(block, lambda: block(long), lambda: block(single), config, frozenset())
    assert [proof.holds for proof in kind.proofs] == [proved]
    assert ("image" in kind.skipped) == (not images)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma4"])
def test_the_verdict_is_on_text(name: str, tmp_path: Path) -> None:
    model, out = BUILDERS[name](tmp_path / "model"), tmp_path / "out"
    verdict = awq.quantize(model, out, awq.QuantConfig(**QUICK), mixed(name)).verdict
    assert verdict is not None
    loaded = load_quantized(out, dtype=torch.float32, kernel="torch")
    original = load_float(model, dtype=torch.float32)
    expected = compare(loaded, original, [torch.tensor(row) for row in texts()], window=64)
    assert verdict.kl == pytest.approx(expected.kl, rel=1e-3)
    assert verdict.perplexity == pytest.approx(expected.perplexity.value, rel=1e-3)

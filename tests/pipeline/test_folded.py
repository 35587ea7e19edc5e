"""The `folded` format: scaled and clipped float weights, for another tool to quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from awq import QuantConfig
from awq.errors import ConfigError
from awq.pipeline import quantize
from awq.pipeline.block import BlockResult
from awq.search import Codes

WEIGHT = torch.tensor([[-3.0, -1.0, 0.5, 9.0, 0.1, 0.2, 0.3, 0.4]])
# Two groups of four in 4 bits: [-2, 5.5] and [0, 7.5].
CODES = Codes(
    torch.zeros(1, 8, dtype=torch.uint8),
    torch.tensor([[0.5, 0.5]], dtype=torch.float16),
    torch.tensor([[4, 0]], dtype=torch.uint8),
)


def result(chosen: str) -> BlockResult:
    return BlockResult({"layer": CODES}, chosen, {chosen: 0.0}, {}, {}, 0, [])


def test_weights_are_clipped_to_what_the_codes_can_stand_for() -> None:
    config = QuantConfig(group_size=8, format="folded")
    clipped = result("nearest").clipped("layer", WEIGHT, config)
    assert clipped.tolist() == [[-2.0, -1.0, 0.5, 5.5, *WEIGHT[0, 4:].tolist()]]


@pytest.mark.parametrize(("chosen", "clip"), [("rtn", True), ("gptq", False)])
def test_nothing_is_clipped_where_no_range_was_searched(chosen: str, clip: bool) -> None:
    config = QuantConfig(group_size=8, format="folded", clip=clip)
    assert result(chosen).clipped("layer", WEIGHT, config) is WEIGHT


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_any_width_can_be_searched_for(bits: int) -> None:
    assert QuantConfig(bits=bits, format="folded").bits == bits
    with pytest.raises(ConfigError, match="holds 2, 3, 4, 5, 6, 7, 8 bits"):
        QuantConfig(bits=9, format="folded")


def test_the_folded_model_computes_what_the_original_computes(
    tiny: Any, tmp_path: Path, token_lists: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama", num_key_value_heads=2)
    model.save_pretrained(tmp_path / "model")
    config = QuantConfig(bits=3, group_size=32, format="folded", clip=False, dtype="float32")
    report = quantize(tmp_path / "model", tmp_path / "out", config, token_lists)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(block.outcome["chosen"] != "rtn" for block in report.blocks) and changed
    ids = torch.tensor(token_lists[:2])
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected, got = model(ids).logits, folded(ids).logits
    assert float((got - expected).abs().max() / expected.std()) < 1e-4

"""Weights that make up for what the layers before them have left wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from awq import QuantConfig, quantize
from awq.evaluate import compare, token_ids
from awq.model.blocks import BlockCall
from awq.model.sums import find_sums
from awq.pipeline.follow import Follower
from awq.pipeline.observe import Batch
from awq.pipeline.stacks import holding
from awq.search import Codes, full_range, nearest


class Two(torch.nn.Module):
    """Two layers that read the same tensor, and add to it one after another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (torch.nn.Linear(32, 32, bias=False) for _ in range(2))
        self.act = torch.nn.Tanh()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.first(hidden)
        return hidden + self.second(self.act(hidden))


def coarse(weight: Tensor) -> Codes:
    return nearest(weight, *full_range(weight, 32), 2, torch.float16)


def batches(seed: int, mask: Tensor | None = None) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [Batch(torch.randn(4, 64, 32, generator=generator), BlockCall((), {}), mask) for _ in range(4)]


@torch.no_grad()
def error_of(corrects: bool, mask: Tensor | None = None, device: str = "cpu") -> float:
    """Of the block's output on unseen inputs, with the first layer at 2 bits and the second one as it is."""
    block, here = Two().eval(), torch.device(device)
    seen, unseen = batches(1, mask), batches(2)
    codes = {"first": coarse(block.first.weight.data)}
    wanted = [block(batch.hidden) for batch in unseen]
    if corrects:
        outputs = [block(batch.hidden) for batch in seen]
        if mask is not None:
            for output in outputs:
                output[~mask] = 1e4  # what is behind the mask does not count
        sums = find_sums(block, ["first", "second"], lambda: block(seen[0].hidden))
        correct = Follower(block, sums, seen, {None: outputs, "act": outputs}, here)
        block.second.weight.data = correct(["second"], codes, block.second.weight.data)
    with holding(block, codes):
        return sum(
            float((block(batch.hidden) - out).square().mean())
            for batch, out in zip(unseen, wanted, strict=True)
        )


def test_a_layer_makes_up_for_the_one_before_it() -> None:
    assert error_of(True) < 0.5 * error_of(False)


def test_padding_does_not_count() -> None:
    mask = torch.arange(64).expand(4, 64) < 48
    assert error_of(True, mask) < 0.5 * error_of(False)


@torch.no_grad()
def test_layers_with_a_common_input_are_left_as_they_are() -> None:
    block, weight = Two(), torch.randn(64, 32)
    sums = find_sums(block, ["first", "second"], lambda: block(torch.randn(1, 4, 32)))
    correct = Follower(block, sums, batches(1), {None: [], "act": []}, torch.device("cpu"))
    assert correct(["first", "second"], {}, weight) is weight


def test_a_trained_model_comes_nearer_to_the_original(books6m: Path, tokenizer: Any, tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(books6m, dtype=torch.float32).eval()
    ids = token_ids("bundled", tokenizer)
    found = {}
    for corrects in (False, True):
        config = QuantConfig(format="float", dtype="float32", correction=corrects)
        quantize(books6m, tmp_path / str(corrects), config, samples=64, seq_len=256, verify=False)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(corrects), dtype=torch.float32).eval()
        found[corrects] = compare(model, original, ids, window=256, max_tokens=4096).kl
    assert found[True] < 0.95 * found[False]

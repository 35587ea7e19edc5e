"""What if a fold rule were wrong, or a consumer overlooked? Every such mutation must be caught by the proof.

The mutations are made in real architectures: a rule of scaling is broken, a layer is hidden from discovery, a
fold is bent. A proof that let one of them pass would let a wrong model pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from awq.model import find_blocks, open_model
from awq.model import invariance as invariance_module
from awq.model import layers as layers_module
from awq.model.groups import propose
from awq.model.invariance import TOLERANCE, prove
from awq.model.layers import Fold, Rule, readers_of, scale_rows
from awq.pipeline.feed import Feed
from zoo import TEXT, build

CPU = torch.device("cpu")
# Plain, (1 + w) norms, LayerNorm with bias feeding attention and MLP, fused layers, ReLU, latent attention,
# linear attention, experts with a shared one.
NAMES = ["llama", "gemma", "phi", "phi3", "opt", "minicpm3", "qwen3_5", "qwen2_moe"]


class Block(NamedTuple):
    module: nn.Module
    run: Callable[[], Any]
    single: Callable[[], Any]
    folds: list[Fold]

    def proofs(self, folds: list[Fold]) -> list[float]:
        """Each fold's change, measured alone."""
        with torch.no_grad():
            return [prove(self.module, [fold], self.run)[0].change for fold in folds]

    def propose(self) -> list[Fold]:
        with torch.no_grad():
            return list(propose(self.module, self.run, self.single).folds)


@pytest.fixture(scope="module", params=NAMES)
def block(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Block]:
    """The last block of a tiny model: of those with several kinds it is the one with experts."""
    folder = Path(tmp_path_factory.mktemp(request.param))
    build(TEXT[request.param], folder)
    skeleton = open_model(folder)
    name, blocks = find_blocks(skeleton.model)
    ids = torch.randint(3, 128, (64,), generator=torch.Generator().manual_seed(0))
    feed = Feed(skeleton, name, [ids], 64, CPU)
    last = len(blocks) - 1 if "moe" in request.param else 0
    skeleton.load(blocks[last], f"{name}.{last}", CPU)
    long, single = feed.probes_at(last)
    found = Block(
        blocks[last], partial(long.whole, blocks[last], CPU), partial(single.whole, blocks[last], CPU), []
    )
    yield found._replace(folds=found.propose())


def test_unbent_folds_pass(block: Block) -> None:
    assert block.folds
    assert max(block.proofs(block.folds)) <= TOLERANCE


def test_a_forgotten_consumer_is_caught(block: Block) -> None:
    bent = [
        dataclasses.replace(fold, consumers=tuple(other for other in fold.consumers if other != name))
        for fold in block.folds
        for name in fold.consumers
    ]
    assert min(block.proofs(bent)) > TOLERANCE


def test_a_shifted_tie_is_caught(block: Block) -> None:
    bent = [dataclasses.replace(fold, tie=fold.tie.roll(1)) for fold in block.folds]
    assert min(block.proofs(bent)) > TOLERANCE


def test_another_rule_is_caught(block: Block) -> None:
    bent = []
    for fold in block.folds:
        linear = isinstance(block.module.get_submodule(fold.producer), nn.Linear)
        wrong: Rule = ("square" if linear else "one_plus") if fold.rule == "factor" else "factor"
        bent.append(dataclasses.replace(fold, rule=wrong))
    assert min(block.proofs(bent)) > TOLERANCE


def test_a_layer_hidden_from_discovery_is_caught(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the layer the fold is proposed for its siblings alone, or in other words: wrongly."""
    shared = [fold for fold in block.folds if len(fold.consumers) > 1]
    if not shared:
        pytest.skip("its layers are fused: no two read the same tensor")
    for fold in shared:
        for hidden in fold.consumers[:3]:
            with monkeypatch.context() as patch:
                patch.setattr(
                    layers_module,
                    "readers_of",
                    lambda module, hidden=hidden: {
                        n: m for n, m in readers_of(module).items() if not n.endswith(hidden)
                    },
                )
                proposed = block.propose()
            wrong = [
                other
                for other in proposed
                if other.producer == fold.producer and set(other.consumers) < set(fold.consumers)
            ]
            assert wrong, hidden
            assert min(block.proofs(wrong)) > TOLERANCE, hidden


def _without_bias(value: Tensor, is_weight: bool, rule: Any, factors: Tensor) -> Tensor:
    return scale_rows(value, is_weight, rule, factors) if is_weight else value


def _always_plain(value: Tensor, is_weight: bool, rule: Any, factors: Tensor) -> Tensor:
    return value * factors.view(-1, *[1] * (value.dim() - 1))


def _inverted(value: Tensor, is_weight: bool, rule: Any, factors: Tensor) -> Tensor:
    return scale_rows(value, is_weight, rule, 1 / factors)


@pytest.mark.parametrize("broken", [_without_bias, _always_plain, _inverted])
def test_a_broken_rule_of_scaling_is_caught(
    broken: Any, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(fold: Fold) -> bool:
        has_bias = block.module.get_submodule(fold.producer)._parameters.get(fold.bias) is not None
        return {_without_bias: has_bias, _always_plain: fold.rule != "factor", _inverted: True}[broken]

    folds = [fold for fold in block.folds if touched(fold)]
    for module in (layers_module, invariance_module):
        monkeypatch.setattr(module, "scale_rows", broken)
    if not folds:
        pytest.skip("this block has nothing that the mutation would touch")
    assert min(block.proofs(folds)) > TOLERANCE

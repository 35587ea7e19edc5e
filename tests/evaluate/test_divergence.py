"""Divergence from a reference, on models whose divergence is known, and speeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scripted import Scripted
from torch import Tensor

from awq.errors import EvaluationError
from awq.evaluate import compare, generation_speeds, perplexity


def constant(row: list[float]) -> Scripted:
    return Scripted(lambda ids: torch.tensor(row).expand(*ids.shape, len(row)))


def random_logits(seed: int, noise: float = 0.0) -> Scripted:
    """Random logits that depend on the ids alone, with a second model's noise added."""

    def logits(ids: Tensor) -> Tensor:
        table = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
        other = torch.randn(50, 50, generator=torch.Generator().manual_seed(seed))
        return (table + noise * other)[ids]

    return Scripted(logits)


IDS = torch.randint(0, 50, (320,), generator=torch.Generator().manual_seed(3))


def test_a_model_does_not_diverge_from_itself() -> None:
    found = compare(random_logits(1), random_logits(1), IDS, window=32)
    assert found.kl == 0
    assert found.kl_stderr == 0
    assert found.top1 == 1
    assert found.perplexity == found.reference_perplexity
    assert found.tokens == 10 * 31


def test_logits_shifted_by_a_constant_are_the_same_distribution() -> None:
    shifted = Scripted(lambda ids: random_logits(1)._logits(ids) + 100)
    assert compare(shifted, random_logits(1), IDS, window=32).kl == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_from_the_reference_to_the_model() -> None:
    """KL(p || q) for p = (1/2, 1/2), q = (1/4, 3/4) and the other way round, by hand."""
    even, uneven = constant([0.0, 0.0]), constant([math.log(0.25), math.log(0.75)])
    ids = torch.zeros(40, dtype=torch.long)
    assert compare(uneven, even, ids, window=8).kl == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert compare(even, uneven, ids, window=8).kl == pytest.approx(expected, rel=1e-5)


def test_figures_and_standard_errors_are_those_of_plain_numpy() -> None:
    model, reference = random_logits(7, noise=0.5), random_logits(7)
    found = compare(model, reference, IDS, window=32, batch_size=3)
    kls, agreements = [], []
    for row in IDS.view(10, 32):
        own, other = (np.float64(m._logits(row[None])[0, :-1].numpy()) for m in (model, reference))
        q, p = (np.exp(x - x.max(-1, keepdims=True)) for x in (own, other))
        q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
        kls.append((p * np.log(p / q)).sum(-1).mean())
        agreements.append((own.argmax(-1) == other.argmax(-1)).mean())
    assert found.kl == pytest.approx(np.mean(kls), rel=1e-5)
    assert found.kl_stderr == pytest.approx(np.std(kls, ddof=1) / math.sqrt(10), rel=1e-4)
    assert found.top1 == pytest.approx(np.mean(agreements))
    assert found.top1_stderr == pytest.approx(np.std(agreements, ddof=1) / math.sqrt(10), rel=1e-4)
    assert 0 < found.top1 < 1


def test_both_perplexities_are_those_of_the_models_alone() -> None:
    model, reference = random_logits(7, noise=0.5), random_logits(7)
    options: dict[str, Any] = {"window": 32, "stride": 16, "max_tokens": 200}
    found = compare(model, reference, IDS, **options)
    assert found.perplexity == perplexity(model, IDS, **options)
    assert found.reference_perplexity == perplexity(reference, IDS, **options)


def test_certain_models_that_disagree_diverge_finitely() -> None:
    one, two = constant([300.0, 0.0]), constant([0.0, 300.0])
    found = compare(one, two, torch.zeros(40, dtype=torch.long), window=8)
    assert found.kl == pytest.approx(300, rel=1e-5)
    assert found.top1 == 0


@pytest.mark.parametrize("broken_one", [0, 1])
def test_a_broken_model_is_refused_on_either_side(broken_one: int) -> None:
    pair = [random_logits(1), random_logits(1)]
    pair[broken_one] = constant([math.nan] * 50)
    with pytest.raises(EvaluationError, match="NaN"):
        compare(*pair, IDS, window=32)


def test_models_of_different_vocabularies_are_refused() -> None:
    with pytest.raises(EvaluationError, match="vocabular"):
        compare(constant([0.0] * 60), random_logits(1), IDS, window=32)


class Clock:
    """A model that takes a known time for each token, on a clock of its own."""

    device = torch.device("cpu")

    def __init__(self, times: dict[str, float], seconds: list[float]) -> None:
        self._times, self._seconds = times, list(seconds)
        self.asked: list[dict[str, Any]] = []

    def generate(self, ids: Tensor, **options: Any) -> None:
        self.asked.append(options)
        self._times["now"] += self._seconds.pop(0) * options["max_new_tokens"]


def test_speeds_are_medians_of_the_rounds_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"now": 0.0}
    monkeypatch.setattr("awq.evaluate.speed.time.perf_counter", lambda: times["now"])
    slow, quick = Clock(times, [9, 1, 0.5, 0.25]), Clock(times, [9, 0.1, 0.1, 0.1])
    found = generation_speeds(
        {"slow": slow, "quick": quick}, torch.ones(1, 3, dtype=torch.long), new_tokens=8, repeats=3
    )
    assert (found["slow"].low, found["slow"].median, found["slow"].high) == pytest.approx((1, 2, 4))
    assert found["quick"].median == pytest.approx(10)
    assert len(slow.asked) == 4
    for asked in slow.asked:
        assert asked["min_new_tokens"] == asked["max_new_tokens"] == 8
        assert asked["do_sample"] is False
        assert asked["attention_mask"].tolist() == [[1, 1, 1]]


def test_a_real_model_has_a_speed(tiny: Any) -> None:
    model = tiny("llama", num_key_value_heads=2)
    found = generation_speeds({"it": model}, torch.tensor([[5, 6, 7]]), new_tokens=3, repeats=2)["it"]
    assert 0 < found.low <= found.median <= found.high

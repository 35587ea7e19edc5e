"""Speed of prefill and decode, the weights that are read, and the memory that is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.evaluate import copy_bandwidth, throughput
from awq.evaluate.throughput import held_bytes, read_bytes
from awq.nn import QuantLinear
from awq.weight import QuantizedWeight


class Clock:
    """A model on a clock of its own: a time for the prompt, then one for each token."""

    device = torch.device("cpu")

    def __init__(self, times: dict[str, float], rounds: list[tuple[float, float]]) -> None:
        self._times, self._rounds = times, list(rounds)
        self.asked: list[tuple[Tensor, dict[str, Any]]] = []
        self.config = self
        self.vocab_size = 50
        self.num_experts_per_tok = None

    def get_text_config(self) -> Clock:
        return self

    def modules(self) -> list[nn.Module]:
        return [nn.Linear(4, 10, bias=False)]

    def generate(self, ids: Tensor, streamer: Any, **options: Any) -> None:
        self.asked.append((ids, options))
        first, each = self._rounds.pop(0)
        streamer.put(ids)
        for number in range(options["max_new_tokens"]):
            self._times["now"] += each if number else first
            streamer.put(ids[:, 0])
        streamer.end()


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    found = {"now": 0.0}
    monkeypatch.setattr("time.perf_counter", lambda: found["now"])
    return found


def test_prefill_and_decode_are_timed_apart_and_the_first_round_does_not_count(
    times: dict[str, float],
) -> None:
    model = Clock(times, [(99, 99), (2, 0.5), (4, 0.25), (1, 1)])
    found = throughput({"it": model}, batch=3, prefill=8, decode=5, repeats=3)["it"]
    assert (found.first_token.low, found.first_token.median, found.first_token.high) == (1, 2, 4)
    assert found.prefill_speed.median == 3 * 8 / 2
    # 15 tokens in 2.5, 1.25 and 5 seconds.
    assert (found.decode_speed.low, found.decode_speed.median, found.decode_speed.high) == (3, 6, 12)
    assert found.read == 160
    assert found.read_speed == 160 * 6 / 3
    ids, options = model.asked[0]
    assert ids.shape == (3, 8)
    assert options["min_new_tokens"] == options["max_new_tokens"] == 6
    assert options["do_sample"] is False


def test_models_take_turns(times: dict[str, float]) -> None:
    models = {name: Clock(times, [(1, 1)] * 3) for name in ("first", "second")}
    order: list[str] = []
    for name, model in models.items():
        real = model.generate
        model.generate = lambda *a, n=name, r=real, **k: (order.append(n), r(*a, **k))  # type: ignore[method-assign]
    throughput(models, 1, 2, 1, repeats=2)
    assert order == ["first", "second"] * 3


def test_weights_read_leave_embeddings_out_unless_they_are_the_output_layer_too(tiny: Any) -> None:
    for tied in (False, True):
        model = tiny("llama", num_key_value_heads=2, tie_word_embeddings=tied)
        held, read = held_bytes(model), read_bytes(model)
        rows = model.model.embed_tokens.weight.numel() * 4
        assert held == sum(p.numel() * 4 for p in model.parameters()) + sum(
            b.numel() * b.element_size() for b in model.buffers()
        )
        assert read == held - (0 if tied else rows)


def test_a_quantized_layer_counts_with_what_its_kernel_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight(
        torch.randint(0, 16, (64, 256), generator=generator, dtype=torch.uint8),
        torch.rand(64, 2, generator=generator).half(),
        torch.zeros(64, 2, dtype=torch.uint8),
    )
    layer = QuantLinear.from_weight(weight)
    before = held_bytes(layer)
    layer.prepare(torch.float32, "torch")
    assert held_bytes(layer) == 64 * 256 // 2 + 64 * 2 * 2 + 64 * 2
    assert before == 64 * 256 // 2 + 64 * 2 * 2 + 64 * 2 // 2  # packed zero points


def test_experts_leave_what_is_read_open(tiny: Any) -> None:
    assert read_bytes(tiny("mixtral", num_key_value_heads=2, num_local_experts=4)) is None


def test_a_real_model_has_figures_that_belong_together(tiny: Any) -> None:
    model = tiny("llama", num_key_value_heads=2)
    found = throughput({"it": model}, batch=2, prefill=7, decode=3, repeats=1)["it"]
    assert found.first_token.low > 0
    assert found.prefill_speed.median == pytest.approx(14 / found.first_token.median)
    assert found.decode_speed.median > 0
    assert found.peak is None or found.peak >= found.weights
    assert found.read is not None
    assert found.read < found.weights


def test_the_copying_bandwidth_is_one_of_a_computer() -> None:
    assert 1e8 < copy_bandwidth("cpu", megabytes=8, repeats=2) < 1e13

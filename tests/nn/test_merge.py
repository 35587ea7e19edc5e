"""Merged layers: outputs, tensors and gradients as apart, however they are called, moved or copied."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from awq.errors import KernelError
from awq.kernels.registry import kernel_named
from awq.nn import Merge, QuantLinear, apart_because
from random_weights import random_weight

ROWS = (48, 16, 32)


def trio(kernel: str = "torch", **changes: Any) -> list[QuantLinear]:
    """Three layers with one input width, the second with a bias; prepared for float32."""
    layers = []
    for seed, rows in enumerate(ROWS):
        bias = torch.linspace(-1, 1, rows) if seed == 1 else None
        layers.append(QuantLinear.from_weight(random_weight(rows, seed=seed, **changes), bias))
        layers[-1].prepare(torch.float32, kernel)
    return layers


def inputs(rows: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the rows of each product of the torch kernel."""
    kernel, seen = kernel_named("torch"), []
    forward = type(kernel).forward

    def counted(self: Any, given: Tensor, state: Any) -> Tensor:
        seen.append(len(given))
        return forward(self, given, state)

    monkeypatch.setattr(type(kernel), "forward", counted)
    return seen


@pytest.mark.parametrize("inference", [False, True])
def test_layers_that_read_one_tensor_are_one_product(
    inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart, merged = trio(), trio()
    merge = Merge(merged)
    seen = products(monkeypatch)
    with torch.inference_mode(inference):
        for seed in range(3):
            x = inputs(seed=seed)
            expected = [layer(x) for layer in apart]
            seen.clear()
            assert all(torch.equal(layer(x), y) for layer, y in zip(merged, expected, strict=True))
            assert len(seen) == 1
    assert merge._last is None  # nothing is held between steps


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 1), (0, 0, 2), (0, 2, 1, 1)])
def test_any_order_of_calls_gives_what_the_layers_give_apart(order: tuple[int, ...]) -> None:
    apart, merged = trio(), trio()
    Merge(merged)
    x = inputs()
    for _ in range(2):
        assert all(torch.equal(merged[index](x), apart[index](x)) for index in order)


@torch.no_grad()
def test_other_tensors_changed_tensors_and_failed_steps_are_not_confused() -> None:
    apart, merged = trio(), trio()
    Merge(merged)
    x = inputs()
    merged[0](x)
    assert torch.equal(merged[1](x.clone() + 1), apart[1](x + 1))
    merged[0](x)
    x.mul_(2)  # in place: the same object
    assert torch.equal(merged[1](x), apart[1](x))
    merged[0](x)
    with pytest.raises(KernelError):
        merged[1](x[:, :7])
    other = inputs(seed=9)
    assert all(torch.equal(a(other), b(other)) for a, b in zip(merged, apart, strict=True))


@torch.inference_mode()
def test_a_hook_that_changes_its_input_in_place_is_seen_in_inference_mode() -> None:
    apart, merged = trio(), trio()
    Merge(merged)
    x, y = inputs(), inputs()

    def triple(layer: nn.Module, args: Any) -> None:
        args[0].mul_(3)

    merged[1].register_forward_pre_hook(triple)
    merged[0](x)
    assert torch.equal(merged[1](x), apart[1](y.mul_(3)))


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients_are_those_of_the_layers_apart(reentrant: bool | None) -> None:
    gradients = []
    for layers in (trio(), trio()):
        if gradients:
            Merge(layers)
        x = inputs().requires_grad_()

        def run(x: Tensor, layers: list[QuantLinear] = layers) -> Tensor:
            return torch.cat([layer(x) for layer in layers], -1).square().sum()

        loss = run(x) if reentrant is None else checkpoint(run, x, use_reentrant=reentrant)
        loss.backward()
        gradients.append(x.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_a_product_without_gradients_is_not_given_to_a_layer_that_wants_them() -> None:
    merged = trio()
    Merge(merged)
    x = inputs().requires_grad_()
    with torch.no_grad():
        merged[0](x)
    assert merged[1](x).requires_grad


@pytest.mark.parametrize("kernel", ["torch", "cpu-int4"])
def test_tensors_are_those_of_the_layers_apart_before_and_after(kernel: str) -> None:
    def stored(layers: list[QuantLinear]) -> list[dict[str, Tensor]]:
        return [layer.state_dict() for layer in layers]

    expected, merged = stored(trio()), trio()
    merge = Merge(merged)
    if kernel != "torch":
        merge.prepare(torch.float32, kernel)
    for step in ("merged", "undone"):
        for found, wanted in zip(stored(merged), expected, strict=True):
            assert list(found) == list(wanted), step
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), step
        merge.undo()
    assert all(layer._merge is None for layer in merged)


@torch.no_grad()
def test_moved_layers_are_merged_again_and_partly_moved_ones_are_not() -> None:
    apart, merged = trio(), nn.ModuleList(trio())
    merge = Merge([*merged])
    merged.to(torch.bfloat16)
    x = inputs().bfloat16()
    assert all(torch.equal(a(x), b.to(torch.bfloat16)(x)) for a, b in zip(merged, apart, strict=True))
    assert all(layer._merge is merge for layer in merged)
    merged[2].to(torch.float32)
    merged[0](x)
    assert all(layer._merge is None for layer in merged)
    assert torch.equal(merged[1](x), apart[1](x))


@torch.no_grad()
def test_loaded_tensors_take_effect_in_one_member_alone() -> None:
    merged, other = trio(), QuantLinear.from_weight(random_weight(16, seed=77), torch.ones(16))
    Merge(merged)
    x = inputs()
    merged[0](x)
    merged[1].load_state_dict(other.state_dict())
    other.prepare(torch.float32, "torch")
    assert torch.equal(merged[1](x), other(x))
    assert torch.equal(merged[0](x), trio()[0](x))


@torch.no_grad()
def test_copies_and_pickles_are_layers_of_their_own() -> None:
    merged = trio()
    Merge(merged)
    file, of_one = io.BytesIO(), io.BytesIO()
    torch.save(merged[1], file)
    torch.save(trio()[1], of_one)
    assert len(file.getvalue()) == len(of_one.getvalue())  # the siblings' codes are not in it
    file.seek(0)
    x = inputs()
    for twin in (copy.deepcopy(merged[1]), torch.load(file, weights_only=False)):
        assert twin._merge is None
        assert torch.equal(twin(x), merged[1](x))


def test_what_cannot_be_multiplied_at_once_says_why() -> None:
    assert apart_because(trio()) is None
    assert "differ" in str(apart_because([trio()[0], trio(columns=128)[1]]))
    assert "differ" in str(apart_because([trio()[0], trio(group=64)[1]]))
    away = trio()
    away[0]._hf_hook = AlignDevicesHook("cpu", offload=True, offload_buffers=True)
    assert "moved" in str(apart_because(away))
    beside = trio()
    beside[0]._hf_hook = AlignDevicesHook("cpu")  # brings inputs, and leaves the codes where they are
    assert apart_because(beside) is None
    mixed = trio()
    mixed[1].prepare(torch.bfloat16)
    assert "differ" in str(apart_because(mixed))


def test_a_traced_step_has_one_product() -> None:
    merged = nn.ModuleList(trio())
    Merge([*merged])
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True)
    def step(x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in merged]

    torch._dynamo.reset()
    with torch.no_grad():
        x = inputs()
        expected = [layer(x) for layer in trio()]
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(step(x), expected, strict=True))
    assert len(graphs) == 1
    assert sum("openawq.multiply" in str(node.target) for node in graphs[0].graph.nodes) == 1

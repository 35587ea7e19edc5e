"""Ingredients of the study that need more than a block's statistics: its batches, or the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from awq.model.layers import linears_of, watch_inputs
from awq.pipeline import block as blocks
from awq.pipeline import folding, observe, run
from awq.search import GramAccumulator, InputStats, scale

measure, quantize_block, search_scale = run.measure, run.quantize_block, folding.search_scale
load = AutoModelForCausalLM.from_pretrained


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """What the block at work is, and its batches: `block`, `batches` and `device`."""
    held: dict[str, Any] = {}

    def measured(
        block: nn.Module, structure: Any, layers: Any, batches: Any, device: torch.device, *more: Any
    ) -> observe.Seen:
        held.update(block=block, batches=batches, device=device)
        return measure(block, structure, layers, batches, device, *more)

    with patch.object(run, "measure", measured):
        yield held


@contextmanager
def by_exact_outputs(folder: Path, samples: Tensor) -> Iterator[None]:
    """Scales of several layers are judged by the output of the module that holds them, as AutoAWQ does.

    That is attention for q, k and v, and the MLP for gate and up, over all calibration tokens. For a layer by
    itself its Gram matrix is exact already.
    """
    with watched() as held:

        def searched(weights: list[Tensor], stats: InputStats, *more: Any) -> scale.ScaleChoice:
            names = {layer.weight.data_ptr(): name for name, layer in linears_of(held["block"]).items()}
            readers = [names[weight.data_ptr()] for weight in weights]
            if len(readers) == 1:
                return search_scale(weights, stats, *more)
            owner = readers[0].rpartition(".")[0]
            error = _OutputError(held, owner, readers)
            with patch.object(scale, "output_error", error):
                return search_scale(weights, stats, *more)

        # An output is that of all rows of the weights.
        with patch.object(folding, "search_scale", searched), patch.object(folding, "_JUDGED_ROWS", 1 << 30):
            yield


class _OutputError:
    """Squared error of a module's output: called for each of its layers, and told with the last of them."""

    def __init__(self, held: dict[str, Any], owner: str, readers: list[str]) -> None:
        block: nn.Module = held["block"]
        self.module = block.get_submodule(owner)
        self.layers = [block.get_submodule(name) for name in readers]
        self.changes: list[Tensor] = []
        self.calls: list[tuple[Any, Any]] = []
        hook = self.module.register_forward_pre_hook(
            lambda module, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
        )
        for batch in held["batches"]:
            batch.run(block, held["device"])
        hook.remove()
        self.wanted = self.outputs()

    def outputs(self) -> list[Tensor]:
        """Of every batch."""
        found = [self.module(*args, **kwargs) for args, kwargs in self.calls]
        return [out[0] if isinstance(out, tuple) else out for out in found]

    def __call__(self, change: Tensor, stats: InputStats) -> Tensor:
        self.changes.append(change.clone())
        total = torch.zeros((), device=change.device)
        if len(self.changes) < len(self.layers):
            return total
        kept = [layer.weight.data for layer in self.layers]
        for layer, weight, delta in zip(self.layers, kept, self.changes, strict=True):
            layer.weight.data = weight + delta
        for out, wanted in zip(self.outputs(), self.wanted, strict=True):
            total += (out - wanted).square().sum()
        for layer, weight in zip(self.layers, kept, strict=True):
            layer.weight.data = weight
        self.changes = []
        return total


@contextmanager
def bias_corrected(folder: Path, samples: Tensor) -> Iterator[None]:
    """Every quantized layer has a float32 bias E[(W - Ŵ) x], on the inputs that the original blocks give.

    Most models have no place for it: this asks what it would be worth.
    """
    biases: list[dict[str, Tensor]] = []
    with watched() as held:

        def quantized(block: nn.Module, *args: Any, **kwargs: Any) -> blocks.BlockResult:
            # It leaves the float weights that the codes stand for, folded like them.
            result = quantize_block(block, *args, **kwargs)
            sums: dict[str, Tensor] = {}
            tokens = 0
            for batch in held["batches"]:
                with watch_inputs(block, partial(_add, sums)):
                    batch.run(block, held["device"])
                tokens += batch.hidden.shape[0] * batch.hidden.shape[1]
            linears = linears_of(block)
            biases.append(
                {
                    name: ((linears[name].weight.data - codes.values()) @ (sums[name] / tokens)).cpu()
                    for name, codes in result.codes.items()
                }
            )
            return result

        def loaded(*args: Any, **kwargs: Any) -> Any:
            model = load(*args, **kwargs)
            for block, found in zip(model.model.layers, biases, strict=True):
                for name, bias in found.items():
                    block.get_submodule(name).bias = nn.Parameter(bias)
            return model

        with (
            patch.object(run, "quantize_block", quantized),
            patch.object(AutoModelForCausalLM, "from_pretrained", loaded),
        ):
            yield


def _add(sums: dict[str, Tensor], name: str, inputs: Tensor) -> None:
    total = inputs.flatten(0, -2).sum(0)
    sums[name] = sums[name] + total if name in sums else total


@contextmanager
def weighted_by_gradient(folder: Path, samples: Tensor) -> Iterator[None]:
    """Each token counts in a Gram matrix as much as the model's loss depends on the layers that read it.

    The weight is the squared gradient, with respect to the layers' outputs, of the log-likelihood of a token
    drawn from the model's own prediction. This takes a backward pass through the whole model.
    """
    weights = gradients(folder, samples)
    seen = iter(range(len(weights)))

    def measured(
        block: nn.Module,
        structure: Any,
        layers: Any,
        batches: Any,
        device: torch.device,
        *more: Any,
    ) -> observe.Seen:
        plain = measure(block, structure, layers, batches, device, *more)
        squares, place = weights[next(seen)], 0
        sums = {
            first: GramAccumulator(item.in_features, device=device) for first, item in plain.stats.items()
        }
        for batch in batches:
            rows = slice(place, place + len(batch.hidden))
            place = rows.stop

            def note(name: str, inputs: Tensor, rows: slice = rows) -> None:
                if name in sums:
                    weight = sum(squares[each][rows] for each in structure.inputs[name])
                    sums[name].add(inputs * weight.sqrt().unsqueeze(-1).to(inputs.device))

            with watch_inputs(block, note):
                batch.run(block, device)
        stats = {
            first: dataclasses.replace(plain.stats[first], gram=total.finish().gram)
            for first, total in sums.items()
        }
        return dataclasses.replace(plain, stats=stats)

    with patch.object(run, "measure", measured):
        yield


@torch.enable_grad()
def gradients(folder: Path, samples: Tensor) -> list[dict[str, Tensor]]:
    """For each block and linear layer the squared gradients of each token, `[samples, tokens]`, mean 1."""
    model: Any = load(folder, dtype=torch.float32)
    found: list[dict[str, list[Tensor]]] = [{} for _ in model.model.layers]

    def keep(module: nn.Module, into: Any, out: Any, where: list[Tensor]) -> None:
        where.append(out[0].square().mean(-1))

    for block, places in zip(model.model.layers, found, strict=True):
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear):
                hook = partial(keep, where=places.setdefault(name, []))
                layer.register_full_backward_hook(hook)
    generator = torch.Generator().manual_seed(0)
    for part in samples.split(8):
        logs = model(part).logits.log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp().flatten(0, 1), 1, generator=generator)
        logs.flatten(0, 1).gather(1, drawn).sum().backward()
        model.zero_grad()
    whole = [{name: torch.cat(parts) for name, parts in places.items()} for places in found]
    return [{name: each / each.mean() for name, each in places.items()} for places in whole]

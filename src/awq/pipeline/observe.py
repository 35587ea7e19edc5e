"""What a block's layers see: one pass over the calibration batches, and a Gram matrix for each shared input.

Experts see the tokens that are routed to them. All projections into the experts of a layer share the router's
input, and so its statistics; each expert's way out has its own, and an expert that saw too few tokens to tell
anything borrows those of all experts of the layer together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from awq.model.blocks import BlockCall
from awq.model.experts import ExpertName, expert_names, only_tokens
from awq.model.layers import Structure, readers_of, watch_inputs, width_of
from awq.search import GramAccumulator, InputStats

# Widest input whose Gram matrix is kept whole (float32: 1.7 GB); wider ones are cut in equal parts.
_WIDEST = 20480
# An expert needs one token for so many of its channels, and so many in any case, to be judged by its own.
_CHANNELS_A_TOKEN, _FEWEST_TOKENS = 8, 32


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch at the block's door.

    Args:
        hidden: float32 `[batch, tokens, width]`.
        call: the block's other arguments.
        mask: bool `[batch, tokens]`, False at padding; None when there is none.
    """

    hidden: Tensor
    call: BlockCall
    mask: Tensor | None

    @property
    def tokens(self) -> int:
        """Rows of the hidden states, padding counted."""
        return self.hidden.shape[0] * self.hidden.shape[1]

    def run(self, block: nn.Module, device: torch.device, keep: bool = False) -> Tensor:
        """The block's output on `device`; `keep` what it writes for later blocks, or forget it."""
        return self.call.run(block, self.hidden.to(device), keep)

    def against(self, output: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """What `output` is off `reference`, and what `reference` adds to the input; zero at padding."""
        reference = reference.to(output.device)
        change, own = output - reference, reference - self.hidden.to(output.device)
        if self.mask is not None:
            keep = self.mask.to(output.device).unsqueeze(-1)
            change, own = change * keep, own * keep
        return change, own

    def whole(self, block: nn.Module, device: torch.device) -> list[Tensor]:
        """The block's output, and the tensors that it writes for later blocks."""
        written: list[Tensor] = []
        return [self.call.run(block, self.hidden.to(device), written=written), *written]


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How the tokens of a layer of experts were spread.

    Args:
        tokens: for each expert, tokens that were routed to it.
        starved: experts that saw too few, and were judged by what all experts saw.
    """

    tokens: list[int]
    starved: list[int]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What `measure` returns.

    Args:
        stats: by the first layer of each shared input that some layer to quantize reads.
        outputs: the block's outputs, on the devices the inputs came from.
        coverage: by the name of each layer of experts.
        sums: inputs of the modules that were asked for, of the first batches, where the outputs are.
    """

    stats: dict[str, InputStats]
    outputs: list[Tensor]
    coverage: dict[str, Coverage]
    sums: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)


def measure(
    block: nn.Module,
    structure: Structure,
    layers: Sequence[str],
    batches: Sequence[Batch],
    device: torch.device,
    group_size: int,
    readers: Collection[str] = (),
    followed: int = 0,
) -> Seen:
    """Run every batch through the block once, and note what the `layers` see.

    Args:
        block: float32, original weights in place.
        structure: shared inputs.
        layers: to quantize.
        batches: calibration samples.
        device: where the block is.
        group_size: smallest part that a Gram matrix may be cut into.
        readers: modules whose inputs are kept, for as many of the first batches as are `followed`.
        followed: see there.
    """
    within = expert_names(block)
    widths = {name: width_of(module) for name, module in readers_of(block).items()}
    wanted = {first for first, members in structure.inputs.items() if set(members) & set(layers)}
    sums = {
        first: GramAccumulator(widths[first], _part_width(widths[first], group_size), device)
        for first in wanted
    }
    source = _sources(structure, within)
    outputs = []
    kept: dict[str, list[Tensor]] = {name: [] for name in readers}
    for number, batch in enumerate(batches):
        keep = None if batch.mask is None else batch.mask.to(device)

        def note(name: str, inputs: Tensor, keep: Tensor | None = keep) -> None:
            first = source.get(name)
            if first in sums:
                rows = inputs.numel() // inputs.shape[-1]
                # Experts are given no padding to begin with.
                masked = keep is not None and keep.numel() == rows and name not in within
                sums[first].add(inputs, keep if masked else None)

        watched = kept if number < followed else {}
        with (
            watch_inputs(block, note),
            only_tokens(block, keep),
            _keeping(block, watched, batch.hidden.device),
        ):
            outputs.append(batch.run(block, device, keep=True).to(batch.hidden.device))
    stats, coverage = _pooled({first: total.finish() for first, total in sums.items()}, within)
    return Seen(stats, outputs, coverage, kept)


@contextmanager
def _keeping(block: nn.Module, kept: Mapping[str, list[Tensor]], home: torch.device) -> Iterator[None]:
    """Within a `with` block, inputs of some modules are appended to lists."""
    with ExitStack() as stack:
        for name, inputs in kept.items():

            def hook(module: nn.Module, args: Any, inputs: list[Tensor] = inputs) -> None:
                inputs.append(args[0].to(home, copy=True))

            stack.callback(block.get_submodule(name).register_forward_pre_hook(hook).remove)
        yield


def _sources(structure: Structure, within: dict[str, ExpertName]) -> dict[str, str]:
    """`{layer: first layer of its input}` for the layers whose inputs are added up.

    One layer of each input is enough, unless that one is an expert's: then all experts' inputs are its.
    """
    out = {}
    for first, members in structure.inputs.items():
        out[first] = first
        if first in within:
            place = within[first]
            same = (name for name in members if name in within and within[name].rest == place.rest)
            out.update(dict.fromkeys(same, first))
    return out


def _pooled(
    stats: dict[str, InputStats], within: dict[str, ExpertName]
) -> tuple[dict[str, InputStats], dict[str, Coverage]]:
    """Statistics with those of starved experts replaced by the pool of all experts of their layer."""
    alike: dict[tuple[str, str], dict[int, str]] = {}
    for first in stats:
        if first in within:
            place = within[first]
            alike.setdefault((place.owner, place.rest), {})[place.number] = first
    stats, coverage = dict(stats), {}
    for (owner, _), names in alike.items():
        if len(names) < 2:
            continue
        each = [stats[names[number]] for number in sorted(names)]
        fewest = max(_FEWEST_TOKENS, each[0].in_features // _CHANNELS_A_TOKEN)
        starved = [number for number in sorted(names) if stats[names[number]].tokens < fewest]
        coverage[owner] = Coverage([item.tokens for item in each], starved)
        if starved:
            stats.update(dict.fromkeys((names[number] for number in starved), _pool(each)))
    return stats, coverage


def _pool(stats: Sequence[InputStats]) -> InputStats:
    """The statistics of all rows together."""
    tokens = sum(item.tokens for item in stats)
    gram, mean_abs = torch.zeros_like(stats[0].gram), torch.zeros_like(stats[0].mean_abs)
    for item in stats:
        gram.add_(item.gram, alpha=item.tokens / max(tokens, 1))
        mean_abs.add_(item.mean_abs, alpha=item.tokens / max(tokens, 1))
    return InputStats(gram, mean_abs, tokens, sum(item.dropped for item in stats))


def coverage_of(seen: dict[str, Coverage]) -> dict[str, Any]:
    """The entry in the report, as JSON values."""
    return {
        owner: {
            "experts": len(item.tokens),
            "fewest_tokens": min(item.tokens),
            "median_tokens": sorted(item.tokens)[len(item.tokens) // 2],
            "most_tokens": max(item.tokens),
            "starved": item.starved,
        }
        for owner, item in seen.items()
    }


def _part_width(channels: int, group_size: int) -> int:
    """Width of the parts of G: all channels where that fits, else the widest equal parts of whole groups."""
    if channels <= _WIDEST or group_size == -1:
        return channels
    for parts in range(2, channels // group_size + 1):
        width = channels // parts
        if channels % parts == 0 and width % group_size == 0 and width <= _WIDEST:
            return width
    return group_size

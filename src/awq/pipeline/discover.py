"""Discovery over a whole model: one block of each kind is loaded, probed, and forgotten."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awq.config import QuantConfig
from awq.errors import ConfigError
from awq.model import Skeleton, find_blocks, open_model
from awq.model.layers import linears_of
from awq.model.overrides import Overrides
from awq.pipeline.feed import Feed
from awq.pipeline.kinds import KindPlan, discover_kind, kinds_of
from awq.pipeline.precision import matmul_precision
from awq.pipeline.skipped import OUTSIDE, left_float


def discover(
    skeleton: Skeleton,
    list_name: str,
    blocks: list[nn.Module],
    feed: Feed,
    config: QuantConfig,
    device: torch.device,
    overrides: Overrides | None = None,
) -> tuple[list[KindPlan], list[KindPlan]]:
    """The kinds of block, and the kind of each block.

    Args:
        skeleton: the opened model.
        list_name, blocks: its decoder blocks.
        feed: gives the probes.
        config: what to quantize to.
        device: where the probes run.
        overrides: corrections to what is found.

    Raises:
        ConfigError: an override speaks of nothing in these blocks, or a fold it adds cannot be proved.
    """
    overrides = overrides or Overrides()
    if silent := overrides.unused(blocks):
        raise ConfigError(f"overrides: nothing in the blocks of this model fits {'; '.join(silent)}")
    if feed.shares_state:
        _run_through(skeleton, list_name, blocks, feed, device)
    kinds: list[KindPlan] = []
    kind_of_block: dict[int, KindPlan] = {}
    named = [_named(skeleton, f"{list_name}.{i}", block, config) for i, block in enumerate(blocks)]
    shared = _shared(skeleton, list_name, len(blocks))
    for members in kinds_of(blocks, list(zip(named, shared, strict=True))):
        first = members[0]
        block, name = blocks[first], f"{list_name}.{first}"
        skeleton.load(block, name, device)
        long, single = feed.probes_at(first)
        with matmul_precision("highest"):
            kind = discover_kind(
                block,
                partial(long.whole, block, device),
                partial(single.run, block, device),
                config,
                named[first],
                shared[first],
                overrides,
                _turned(skeleton, name, block),
            )
        skeleton.unload(block)
        kinds.append(kind)
        kind_of_block.update(dict.fromkeys(members, kind))
    return kinds, [kind_of_block[i] for i in range(len(blocks))]


def _run_through(
    skeleton: Skeleton, list_name: str, blocks: list[nn.Module], feed: Feed, device: torch.device
) -> None:
    """Take the probes through all blocks, where blocks need what earlier ones hand to them."""
    hidden = [probe.hidden for probe in feed.probes_at(0)]
    for index, block in enumerate(blocks):
        skeleton.load(block, f"{list_name}.{index}", device)
        calls = [probe.call for probe in feed.probes_at(index)]
        states = zip(calls, hidden, strict=True)
        hidden = [call.run(block, state.to(device), keep=True).cpu() for call, state in states]
        skeleton.unload(block)


def _shared(skeleton: Skeleton, list_name: str, count: int) -> list[frozenset[str]]:
    """For each block the modules in it that own a tensor which lies in another block as well."""
    places: dict[str, set[tuple[int, str]]] = {}
    for name, key in skeleton.keys.items():
        if name.startswith(f"{list_name}."):
            number, _, path = name.removeprefix(f"{list_name}.").partition(".")
            places.setdefault(key, set()).add((int(number), path.rpartition(".")[0]))
    several = [found for found in places.values() if len({index for index, _ in found}) > 1]
    return [
        frozenset(module for found in several for index, module in found if index == block)
        for block in range(count)
    ]


def _named(skeleton: Skeleton, name: str, block: nn.Module, config: QuantConfig) -> frozenset[str]:
    """Linear layers of a block whose name in the checkpoint holds a part in `modules_to_not_convert`."""
    hub = {layer: skeleton.keys[f"{name}.{layer}.weight"] for layer in linears_of(block)}
    parts = config.modules_to_not_convert
    return frozenset(layer for layer, key in hub.items() if any(part in key for part in parts))


def _turned(skeleton: Skeleton, name: str, block: nn.Module) -> frozenset[str]:
    """Linear layers of a block that the model keeps in a `Conv1D`."""
    return frozenset(
        layer
        for layer in linears_of(block)
        if skeleton.keys.get(f"{name}.{layer}.weight") in skeleton.transposed
    )


def structure_of(
    folder: Path,
    config: QuantConfig,
    trust_remote_code: bool = False,
    overrides: Overrides | None = None,
) -> dict[str, Any]:
    """What quantizing a float model with `config` would do, as JSON values; nothing is written.

    Returns:
        `architecture`, `list` (name of the list of blocks), `blocks`, `kinds` (see `KindPlan.describe`), and
        `outside` (linear layers outside the blocks).
    """
    skeleton = open_model(folder, trust_remote_code)
    overrides = overrides or Overrides()
    config = overrides.joined(config)
    list_name, blocks = find_blocks(skeleton.model, overrides.blocks)
    device = torch.device("cpu")
    ids = torch.randint(0, skeleton.vocabulary, (64,), generator=torch.Generator().manual_seed(0))
    # Tokens that stand for images mean nothing without them.
    ids = ids[~torch.isin(ids, skeleton.placeholders)]
    feed = Feed(skeleton, list_name, [ids], len(ids), device)
    kinds, kind_of_block = discover(skeleton, list_name, blocks, feed, config, device, overrides)
    floats = left_float(skeleton, list_name, kind_of_block)
    return {
        "architecture": type(skeleton.model).__name__,
        "list": list_name,
        "blocks": len(blocks),
        "kinds": [
            kind.describe([i for i in range(len(blocks)) if kind_of_block[i] is kind]) for kind in kinds
        ],
        "outside": [name for name, reason in floats.items() if reason == OUTSIDE],
    }

"""A float model's structure as a tree, before any work: what was found, and what will become of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.text import Text
from rich.tree import Tree

# Numbers for which a star stands where lines are alike: those of experts, and any in a name.
_EXPERT, _ANY_NUMBER = r"(?<=\bexperts\.)\d+(?=\.)", r"(?<=\.)\d+(?=\.)"
_RULES = {
    "factor": "",
    "one_plus": " (a norm that applies 1 + w)",
    "square": " (by their root: they are squared behind it)",
}


def structure_tree(model: str, value: Mapping[str, Any]) -> Tree:
    """The tree of what `awq.pipeline.structure_of` found. Experts of a layer that are alike share a line.

    Args:
        model: how the user called it.
        value: what was found.
    """
    tree = Tree(f"{model}: {value['architecture']}, {value['blocks']} blocks in {value['list']}")
    for kind in value["kinds"]:
        title = Text(f"{kind['name']} x {len(kind['blocks'])}", style="bold")
        branch = tree.add(title.append(f", block {_ranges(kind['blocks'])}", style="not bold"))
        _add_folds(branch, kind)
        _add_layers(branch, "quantized without a scale", kind["unscaled"], "yellow")
        _add_layers(branch, "stays float", kind["skipped"], "yellow")
        _add_layers(branch, "stays as it is", kind["others"], "dim")
    outside = dict.fromkeys(value["outside"], "")
    _add_layers(tree, "outside the blocks, stays float", outside, "dim", _ANY_NUMBER)
    return tree


def _add_folds(branch: Tree, kind: Mapping[str, Any]) -> None:
    alike: dict[Any, list[Mapping[str, Any]]] = {}
    for fold in kind["folds"]:
        readers = Counter(_starred(_reader(name, kind)) for name in fold["consumers"])
        key = (_starred(fold["producer"]), fold["rule"], fold["channels"], fold["proved"])
        alike.setdefault((*key, tuple(readers.items())), []).append(fold)
    for (producer, rule, channels, proved, found), folds in alike.items():
        readers = Counter(dict(found))
        worst = max(fold["change"] for fold in folds)
        line = f"{producer}{_times(len(folds))} scales {channels} channels{_RULES[rule]}: "
        line += f"proved to {worst:.0e}" if proved else _dropped(worst)
        fold_branch = branch.add(Text(line, style="green" if proved else "red"))
        for reader, count in readers.items():
            fold_branch.add(f"{reader}{_times(count)}")


def _dropped(change: float) -> str:
    if math.isfinite(change):
        return f"dropped, the output would change by {change:.0e}"
    return "dropped, layers that did not run, or that blocks share, may have part in it"


def _reader(name: str, kind: Mapping[str, Any]) -> str:
    """A layer that reads a scaled tensor, with its measures."""
    shape = " x ".join(map(str, kind["shapes"].get(name, ())))
    return name + (f"  {shape}" if shape else "") + ("  stays float" if name in kind["skipped"] else "")


def _add_layers(
    branch: Tree, heading: str, layers: Mapping[str, str], style: str, alike: str = _EXPERT
) -> None:
    named = (f"{name}: {reason}" if reason else name for name, reason in layers.items())
    lines = Counter(_starred(line, alike) for line in named)
    if lines:
        part = branch.add(Text(heading, style=style))
        for text, count in lines.items():
            part.add(f"{text}{_times(count)}")


def _starred(text: str, number: str = _EXPERT) -> str:
    """`text` with a star in the place of an expert's number, or of another."""
    return re.sub(number, "*", text)


def _times(count: int) -> str:
    return f" (x {count})" if count > 1 else ""


def _ranges(numbers: list[int]) -> str:
    """`0-3, 5` for 0, 1, 2, 3, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)

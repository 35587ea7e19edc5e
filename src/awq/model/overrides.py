"""What a person knows better than discovery, for one model: a small file of data.

It may name the list of blocks, leave layers float, forbid folds, and add folds that discovery does not see.
An added fold is proved like any other; one that fails is refused with the figure, never used.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from awq.config import QuantConfig
from awq.errors import ConfigError, MissingDependencyError, MissingFileError
from awq.model.invariance import TOLERANCE, Proof
from awq.model.layers import Fold, Rule, Structure, readers_of, width_of


@dataclasses.dataclass(frozen=True)
class AddedFold:
    """A fold to add, by names inside a block.

    Args:
        producer: the module whose rows are scaled; empty for a parameter of the block itself.
        consumers: the layers that read what it produces: all of them, of whatever inputs.
        rule: see `awq.model.layers.Fold`.
        weight, bias: the producer's parameters.
        rows: `[start, stop]` or `[start, stop, step]`: the rows that stand behind the consumers' channels, in
            their order; all by default.
        head, repeat: rows in runs of `head`, each run read `repeat` times in a row (grouped queries).
    """

    producer: str
    consumers: tuple[str, ...]
    rule: Rule = "factor"
    weight: str = "weight"
    bias: str = "bias"
    rows: tuple[int, ...] = ()
    head: int = 1
    repeat: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "consumers", tuple(self.consumers))
        object.__setattr__(self, "rows", tuple(self.rows))
        whole = all(type(number) is int for number in (*self.rows, self.head, self.repeat))
        sane = whole and len(self.rows) in (0, 2, 3) and min((*self.rows[2:], self.head, self.repeat)) > 0
        if not self.consumers or self.rule not in get_args(Rule) or not sane:
            raise ConfigError(
                f"the added fold {self} needs consumers, a rule among {', '.join(get_args(Rule))}, and "
                "rows of the form [start, stop] or [start, stop, step]; head and repeat are numbers above 0"
            )

    def __str__(self) -> str:
        return f"{self.producer or self.weight} → {', '.join(self.consumers)}"

    def fits(self, block: nn.Module) -> bool:
        """Whether a block has all that is named."""
        modules = dict(block.named_modules())
        producer = modules.get(self.producer)
        there = producer is not None and producer._parameters.get(self.weight) is not None
        return there and set(self.consumers) <= set(readers_of(block))

    def fold(self, block: nn.Module) -> Fold:
        """The fold in a block that it fits.

        Raises:
            ConfigError: the rows do not come out at the consumers' channels.
        """
        weight = block.get_submodule(self.producer)._parameters[self.weight]
        assert weight is not None  # it fits
        count = weight.shape[0]
        rows = torch.arange(count)[slice(*self.rows)] if self.rows else torch.arange(count)
        tie = torch.arange(len(rows))
        if self.repeat > 1 and len(rows) % self.head == 0:
            tie = tie.view(-1, self.head).repeat_interleave(self.repeat, 0).flatten()
        widths = {width_of(readers_of(block)[name]) for name in self.consumers}
        if widths != {len(tie)}:
            raise ConfigError(
                f"overrides: {self}: {len(rows)} rows stand for {len(tie)} channels, and the consumers read "
                f"{' and '.join(map(str, sorted(widths)))}"
            )
        place = weight.device
        return Fold(
            self.producer, self.rule, rows.to(place), tie.to(place), self.consumers, self.weight, self.bias
        )


@dataclasses.dataclass(frozen=True)
class Overrides:
    """What is known about one model.

    Args:
        blocks: name of the list of decoder blocks.
        leave_float: parts of names of layers that are not quantized.
        deny: producers, by their names inside a block, that take no scale.
        fold: folds to add. Each takes the place of what was discovered for its consumers and its producer.
    """

    blocks: str | None = None
    leave_float: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    fold: tuple[AddedFold, ...] = ()

    @classmethod
    def of(cls, value: Overrides | Mapping[str, Any] | str | Path | None) -> Overrides:
        """From a TOML or JSON file, or what such a file holds.

        Raises:
            MissingFileError: there is no such file.
            ConfigError: it says something else than overrides.
            MissingDependencyError: Python is too old to read TOML by itself.
        """
        if value is None or isinstance(value, Overrides):
            return value or cls()
        if isinstance(value, (str, Path)):
            value = _read(Path(value).expanduser())
        try:
            folds = tuple(AddedFold(**entry) for entry in value.get("fold", ()))
            lists = {name: _names(name, value[name]) for name in ("leave_float", "deny") if name in value}
            return cls(**{**value, **lists, "fold": folds})
        except TypeError as error:
            known = ", ".join(field.name for field in dataclasses.fields(cls))
            raise ConfigError(
                f"overrides: {error}; known are: {known}, and in a fold: producer, consumers, "
                "rule, weight, bias, rows, head, repeat"
            ) from error

    def joined(self, config: QuantConfig) -> QuantConfig:
        """A configuration that leaves these layers float too."""
        skipped = (*config.modules_to_not_convert, *self.leave_float)
        return dataclasses.replace(config, modules_to_not_convert=tuple(dict.fromkeys(skipped)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def apply(self, block: nn.Module, structure: Structure) -> Structure:
        """What was discovered in a block, corrected.

        Raises:
            ConfigError: an added fold's rows do not come out at its consumers' channels.
        """
        added = [entry.fold(block) for entry in self.fold if entry.fits(block)]
        taken = {name for fold in added for name in fold.consumers}
        producers = {(fold.producer, fold.weight) for fold in added}
        kept = [
            fold
            for fold in structure.folds
            if fold.source not in self.deny
            and fold.producer not in self.deny
            and not taken & set(fold.consumers)
            and (fold.producer, fold.weight) not in producers
        ]
        denied = {
            fold.consumers[0]: fold.source
            for fold in structure.folds
            if fold.source in self.deny or fold.producer in self.deny
        }
        return dataclasses.replace(structure, folds=(*kept, *added), denied=denied)

    def require(self, proofs: Sequence[Proof], where: str) -> None:
        """Refuse added folds that do not hold.

        Args:
            proofs: of a kind of block.
            where: its name.

        Raises:
            ConfigError: with the figure.
        """
        ours = {(entry.producer, entry.consumers) for entry in self.fold}
        for proof in proofs:
            fold = proof.fold
            if (fold.producer, fold.consumers) in ours and not proof.holds:
                raise ConfigError(
                    f"overrides: folding {fold.source} into {', '.join(fold.consumers)} would change the "
                    f"output of {where} by {proof.change:.1e}, and {TOLERANCE:.0e} is allowed: something "
                    "else reads what it gives too, or its rule or its rows are others"
                )

    def unused(self, blocks: list[nn.Module]) -> list[str]:
        """Entries that speak of nothing in these blocks: misspelled, most likely."""
        modules = {name for block in blocks for name, _ in block.named_modules()}
        modules |= {name for block in blocks for name, _ in block.named_parameters()}
        silent = [str(entry) for entry in self.fold if not any(entry.fits(block) for block in blocks)]
        silent += [name for name in self.deny if name not in modules]
        return silent + [part for part in self.leave_float if not any(part in name for name in modules)]


def _names(field: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(name, str) and name for name in value):
        raise ConfigError(f"overrides: {field} must be a list of names, not {value!r}")
    return tuple(value)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFileError(f"there is no file {path} with overrides")
    text = path.read_text("utf-8")
    try:
        value = json.loads(text) if path.suffix == ".json" else _toml().loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no table of overrides")
    return value


def _toml() -> Any:
    for name in ("tomllib", "tomli"):  # the first comes with Python 3.11
        if importlib.util.find_spec(name):
            return importlib.import_module(name)
    raise MissingDependencyError(
        "overrides in TOML need Python 3.11 or the package tomli; JSON needs neither"
    )

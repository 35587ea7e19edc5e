"""A block as layers that read and produce: which there are, what they see, how their rows are scaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import Tensor, nn

Rule = Literal["factor", "one_plus", "square"]


@dataclasses.dataclass(frozen=True)
class Fold:
    """A producer and the layers that read what it produces.

    Args:
        producer: module name inside the block.
        rule: `factor` multiplies the producer's weight (and bias), `one_plus` is for norms that apply 1 + w,
            `square` multiplies by the root, for layers whose output is squared behind them (ReLU²).
        rows: int64 `[free]`, the producer's rows that may be scaled.
        tie: int64 `[in]`, for each input channel of the consumers the index into `rows`, or -1.
        consumers: names of the linear layers whose input channels are compensated.
        weight, bias: the producer's parameters that are scaled, by their names there; a bias that does not
            exist is passed over.
    """

    producer: str
    rule: Rule
    rows: Tensor
    tie: Tensor
    consumers: tuple[str, ...]
    weight: str = "weight"
    bias: str = "bias"

    @property
    def source(self) -> str:
        """The producer, for a person: with the parameter's name where that is an unusual one."""
        name = "" if self.weight == "weight" else self.weight
        return f"{self.producer}.{name}".strip(".")


@dataclasses.dataclass(frozen=True)
class Structure:
    """What was found in one kind of block.

    Args:
        inputs: linear layers by shared input: `{first layer's name: all layers that read the same tensor}`.
        folds: proposals, at most one for each input.
        behind: for an input without a proposal, the last norm or linear layer that has an effect on it,
            which is no plain factor; no entry where there is none.
        denied: producers that the user does not want scaled, by input.
    """

    inputs: dict[str, tuple[str, ...]]
    folds: tuple[Fold, ...]
    behind: dict[str, str] = dataclasses.field(default_factory=dict)
    denied: dict[str, str] = dataclasses.field(default_factory=dict)


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The block's linear layers by name, in order of definition."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def readers_of(block: nn.Module) -> dict[str, nn.Module]:
    """Every module that may multiply its input with a matrix `weight` `[out, in]` of its own.

    Beside linear layers these are the routers of mixtures of experts, which are modules of many classes.
    Whether they do multiply so is not asked here: a fold that takes them for what they are not fails its
    proof.
    """
    out = {}
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            out[name] = module
    return out


def width_of(reader: nn.Module) -> int:
    """Input channels of a module in `readers_of`."""
    weight = reader._parameters["weight"]
    assert weight is not None  # readers are found by their weight
    return weight.shape[1]


@contextmanager
def watch_inputs(block: nn.Module, seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `seen(name, input)` whenever a linear layer, or a module like one, of the block runs."""
    with ExitStack() as stack:
        for name, reader in readers_of(block).items():

            def hook(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
                if given is not None and given.shape[-1] == width_of(module):
                    seen(name, given)

            stack.callback(reader.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def inputs_of(block: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Input of each linear layer as `[rows, in]`; a layer that runs several times keeps its first input.

    Zeros (an expert whose turn it is not) say nothing of where an input comes from, and give way to the next.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str, inputs: Tensor) -> None:
        if name not in seen or not bool(seen[name].any()):
            seen[name] = inputs.reshape(-1, inputs.shape[-1])

    with watch_inputs(block, note):
        run()
    return seen


@contextmanager
def scaled(
    module: nn.Module, rule: Rule, factors: Tensor, weight: str = "weight", bias: str = "bias"
) -> Iterator[None]:
    """Multiply what `module` produces, row by row, by `factors` for the time of a `with` block."""
    kept = {n: p for n in (weight, bias) if (p := module._parameters.get(n)) is not None}
    try:
        for name, parameter in kept.items():
            value = scale_rows(parameter.data, name == weight, rule, factors)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        module._parameters.update(kept)


def rows_of(module: nn.Module, name: str = "weight") -> int:
    """Rows of a producer: entries of a norm's weight, output features of a linear layer."""
    weight = module._parameters[name]
    assert weight is not None  # producers are found by their weight
    return weight.shape[0]


def scale_rows(value: Tensor, is_weight: bool, rule: Rule, factors: Tensor) -> Tensor:
    """A producer's weight, or its bias, with its rows multiplied by `factors` `[rows]`."""
    if rule == "one_plus" and is_weight:
        return (value + 1) * factors - 1
    if rule == "square":
        factors = factors.sqrt()
    return value * factors.view(-1, *[1] * (value.dim() - 1))

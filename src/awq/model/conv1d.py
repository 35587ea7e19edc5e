"""GPT-2's `Conv1D`: a linear layer that keeps its weight `[in, out]`, in memory and on disk.

While a model is quantized or runs on codes, a true linear layer stands in its place, so that nothing else has
to know. Only what reads or writes float weights turns them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awq.model.names import match_names


def as_linear(module: nn.Module) -> nn.Linear | None:
    """A linear layer without values for a `Conv1D`; None for any other module."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, Conv1D):
        return None
    linear = nn.Linear(module.nx, module.nf, device="meta", dtype=module.weight.dtype)
    return linear.requires_grad_(False)


def straighten(model: nn.Module) -> list[str]:
    """Put a linear layer in the place of each `Conv1D`; returns the names of their weights."""
    names = []
    for path, module in list(model.named_modules()):
        linear = as_linear(module)
        if linear is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
            names.append(f"{path}.weight")
    return names


def conv1d_of(linear: nn.Linear) -> nn.Module:
    """The `Conv1D` that computes the same as a linear layer with a bias."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        module: Any = Conv1D(linear.out_features, linear.in_features)
    module.weight = nn.Parameter(linear.weight.t().contiguous(), requires_grad=False)
    module.bias = linear.bias
    return module


def conv1d_layers(folder: Path, layers: Iterable[str]) -> set[str]:
    """Which of a checkpoint's layers the causal language model of this folder keeps in a `Conv1D`.

    Args:
        folder: a model folder. One whose configuration transformers does not know has none.
        layers: names as the checkpoint has them.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError):
        return set()
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None or not hasattr(sys.modules[kind.__module__], "Conv1D"):
        return set()
    with init_empty_weights():
        model = kind._from_config(config)
    keys, _ = match_names(model, [f"{layer}.weight" for layer in layers])
    return {keys[name].removesuffix(".weight") for name in straighten(model) if name in keys}

"""Make a tiny model whose every weight matters, and save it as a checkpoint of the hub would look."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from zoo.text import Architecture

# Channels of a norm that stand out, and by how much: a scale folded the wrong way cannot hide among them.
_OUTLIERS, _HEIGHT = 3, 6.0


def build(architecture: Architecture, folder: Path, seed: int = 0) -> Any:
    """Save a tiny model to `folder`, float32; returns the model.

    Args:
        architecture: an entry of `zoo.TEXT`.
        folder: where it goes.
        seed: of the weights.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(architecture.config(), dtype=torch.float32).eval()
    lively(model, seed)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def lively(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter random values that leave activations at about 1.

    Initial values would hide mistakes: biases of zero, norms of one, matrices so small that a block adds
    nothing to what passes by it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter += noise * 0.3
            if re.search(r"norm|ln_|layernorm", name.lower()) and name.endswith("weight"):
                places = torch.randperm(len(parameter), generator=generator)[:_OUTLIERS]
                parameter[places] += _HEIGHT
        elif "embed" in name or re.search(r"wte|wpe", name):
            # Tied embeddings are the output layer too: logits of a few units, as trained models have them.
            parameter.copy_(noise / 4)
        else:
            # Experts lie side by side in one parameter, and each has as many channels as its own matrix.
            channels = parameter.shape[-1] if "experts" in name else parameter[0].numel()
            parameter.copy_(noise / channels**0.5)

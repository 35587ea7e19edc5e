"""The one function that moves things to a device.

Blocks are called with nested keyword arguments (masks, rotary embeddings in tuples, dicts, dataclasses of
tensors); a single missed tensor is the well-known «Expected all tensors to be on the same device».
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from awq.errors import ConfigError


def place(value: Any, device: torch.device, moved: dict[int, Any] | None = None) -> Any:
    """`value` with every tensor inside it on `device`, whatever the nesting; other values unchanged.

    Dictionaries and lists are copied. What occurs twice is moved once, and stays one thing.

    Args:
        value: anything.
        device: where its tensors go.
        moved: filled with what each tensor, dictionary and list became, by the `id` of the original.
    """
    moved = {} if moved is None else moved
    if id(value) in moved:
        return moved[id(value)]
    if isinstance(value, Tensor):
        out: Any = value.to(device)
    elif isinstance(value, Mapping):
        out = type(value)({key: place(item, device, moved) for key, item in value.items()})  # type: ignore[call-arg]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(place(item, device, moved) for item in value))
    elif isinstance(value, (list, tuple)):
        out = type(value)(place(item, device, moved) for item in value)
    else:
        return value
    moved[id(value)] = out
    return out


def pick_device(name: str) -> torch.device:
    """`auto` is the first accelerator there is, else the CPU; any other name is torch's own.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # not every device that can be named computes
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}); try `auto` or `cpu`") from error
    return device

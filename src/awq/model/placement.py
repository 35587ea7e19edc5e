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


def place(value: Any, device: torch.device, _moved: dict[int, Tensor] | None = None) -> Any:
    """`value` with every tensor inside it on `device`, whatever the nesting; other values unchanged.

    A tensor that occurs twice is moved once, and stays one tensor.
    """
    moved = {} if _moved is None else _moved
    if isinstance(value, Tensor):
        return moved.setdefault(id(value), value.to(device))
    if isinstance(value, Mapping):
        items = {key: place(item, device, moved) for key, item in value.items()}
        return type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(place(item, device, moved) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(place(item, device, moved) for item in value)
    return value


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

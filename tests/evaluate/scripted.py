"""A stand-in for a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Scripted:
    """Stands in for a model: its logits are a function of the ids."""

    device = torch.device("cpu")

    def __init__(self, logits: Any) -> None:
        self._logits = logits

    def __call__(self, ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self._logits(ids))

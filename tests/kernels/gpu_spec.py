"""A layer on a GPU, as kernels are asked about it."""

from __future__ import annotations

import torch

from awq.kernels import LayerSpec


def spec(**changes: object) -> LayerSpec:
    fields: dict[str, object] = {
        "device": "cuda",
        "dtype": torch.float16,
        "in_features": 256,
        "out_features": 72,
        "group_size": 64,
    }
    return LayerSpec(**(fields | changes))  # type: ignore[arg-type]

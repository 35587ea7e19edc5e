"""A random quantized weight, the same each time."""

from __future__ import annotations

import torch

from awq.weight import QuantizedWeight


def random_weight(
    rows: int = 48,
    columns: int = 64,
    group: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    bits: int = 4,
) -> QuantizedWeight:
    """Codes `[rows, columns]`, with scales of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns // group)
    return QuantizedWeight(
        torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8),
        (torch.rand(shape, generator=generator) * 0.02 + 0.001).to(dtype),
        torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8),
        bits,
    )

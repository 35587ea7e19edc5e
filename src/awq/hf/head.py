"""An output head in 8 bits, made when a model is loaded: half the bytes that each token reads of it.

Checkpoints keep the head in 16 bits, and of a small model with a large vocabulary it is the largest layer.
Each row gets one scale, symmetric around zero, and its product is that of any layer of 8 bits. A head that is
tied to the embeddings gets codes of its own, and the embeddings stay what they are. Nothing of it is saved:
`AwqQuantizer` refuses to write a model whose head was rounded here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import ConfigError, KernelError
from awq.hf.replace import untie
from awq.kernels import LayerSpec, choose
from awq.model.unfuse import put
from awq.nn import QuantLinear
from awq.search.rounding import Codes, full_range, nearest
from awq.weight import QuantizedWeight

BITS = 8
# Rows that are rounded at once, in float32.
_ROWS = 4096


def check_head_bits(bits: int | None) -> None:
    """Refuse a width that there is no head of.

    Raises:
        ConfigError: it is neither None nor 8.
    """
    if bits is not None and (type(bits) is not int or bits != BITS):
        raise ConfigError(
            f"head_bits={bits!r}: a head is rounded to {BITS} bits, or (None) kept as it was saved"
        )


def quantize_head(model: Any, kernel: str | None = None) -> bool:
    """Round the output head of a loaded model to 8 bits, row by row.

    A model whose head cannot be, or would become slower, is left as it is, and one warning says why.

    Args:
        model: a transformers model that came through `AwqQuantizer`.
        kernel: insist on this one, if it serves such a head.

    Returns:
        Whether the head was rounded.
    """
    path, reason = _head_of(model)
    head: Any = model.get_submodule(path) if reason is None else None
    if reason is None:
        reason, kernel = _kernel_for(head, kernel)
    if reason is not None:
        warnings.warn(f"the output head stays as it was saved: {reason}", stacklevel=3)
        return False
    dtype = head.weight.dtype
    with torch.no_grad():
        layer = QuantLinear.from_weight(_rounded(head.weight), head.bias)
    layer.prepare(dtype, kernel)
    put(model, path, layer)
    untie(model, [path])
    model.hf_quantizer.rounded_head = path
    return True


def _head_of(model: Any) -> tuple[str, str | None]:
    """Where the head is, and why it cannot be rounded."""
    head = model.get_output_embeddings()
    if head is None:
        return "", "the model has none"
    path = next((name for name, module in model.named_modules() if module is head), "")
    if isinstance(head, QuantLinear):
        return path, "it is quantized already"
    if type(head) is not nn.Linear or not path:
        return path, f"it is a {type(head).__name__}, and not a linear layer of the model"
    if head.weight.is_meta or hasattr(head, "_hf_hook"):
        return path, "accelerate moves its weight or its inputs between devices"
    return path, None


def _kernel_for(head: nn.Linear, kernel: str | None) -> tuple[str | None, str | None]:
    """Why no fast kernel serves the head, and the one to insist on."""
    device = head.weight.device.type
    spec = LayerSpec(device, head.weight.dtype, head.in_features, head.out_features, head.in_features, BITS)
    if kernel is not None:
        with suppress(KernelError):
            choose(spec, kernel)
            return None, kernel
    choice = choose(spec)
    return (choice.reason if choice.kernel.name == "torch" else None), None


def _rounded(weight: Tensor) -> QuantizedWeight:
    """weight `[out, in]` with one symmetric scale for each row."""
    parts = list(_parts(weight))
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return QuantizedWeight(codes, scales, zeros, BITS)


def _parts(weight: Tensor) -> Iterator[Codes]:
    for rows in weight.split(_ROWS):
        floats = rows.float()
        ranges = full_range(floats, floats.shape[1])
        yield nearest(floats, *ranges, BITS, torch.float32, symmetric=True)

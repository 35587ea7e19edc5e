"""What a processor makes of text and images, taken as it is: a model's whole input for a few conversations.

Which pixels belong to which tokens is the model's own business, so such an input is neither cut nor put
together with others. What turns out to be text alone becomes ordinary token samples.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from awq.errors import CalibrationError, first_line

# Entries that say nothing to a model that is given text alone, as long as they are zero.
_TYPES = ("token_type_ids", "mm_token_type_ids")
# Entries that are no input.
_LEFT_OUT = ("labels",)


@dataclasses.dataclass(frozen=True, eq=False)
class ModelInputs:
    """Everything a model is called with, on the CPU.

    Args:
        values: `input_ids` int64 `[rows, tokens]`, usually `attention_mask` of the same shape, and what the
            processor made of images (`pixel_values`, `image_grid_thw`, …).
    """

    values: dict[str, Any]

    @property
    def input_ids(self) -> Tensor:
        """int64 `[rows, tokens]`."""
        return self.values["input_ids"]

    @property
    def mask(self) -> Tensor | None:
        """bool `[rows, tokens]`, True at real tokens; None when nothing is padded."""
        mask = self.values.get("attention_mask")
        return None if mask is None or bool(mask.all()) else mask.bool()

    def __len__(self) -> int:
        """Real tokens of all rows."""
        return self.input_ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def rows(self) -> list[Tensor]:
        """The real tokens of each row, int64 `[tokens]`."""
        masks = torch.ones_like(self.input_ids, dtype=torch.bool) if self.mask is None else self.mask
        return [ids[keep] for ids, keep in zip(self.input_ids, masks, strict=True)]

    @property
    def is_text(self) -> bool:
        """Whether the tokens are all there is."""
        more = set(self.values) - {"input_ids", "attention_mask", *_TYPES}
        return not more and not any(bool(self.values[name].any()) for name in _TYPES if name in self.values)

    def add_to(self, digest: hashlib._Hash) -> None:
        """Add every name, shape and value to a hash, images included."""
        for name in sorted(self.values):
            digest.update(name.encode())
            _add(digest, self.values[name])


def model_inputs(values: Mapping[str, Any], where: str) -> ModelInputs:
    """Check what a processor returned.

    Args:
        values: a dictionary, or a processor's or a tokenizer's own kind of one.
        where: for messages.

    Raises:
        CalibrationError: it is no input that a model could be called with.
    """
    made = {
        name: _tensors(value, f"{where}: {name}")
        for name, value in values.items()
        if name not in _LEFT_OUT and value is not None
    }
    ids = made.get("input_ids")
    if ids is None:
        raise CalibrationError(f"{where} has no input_ids, but {', '.join(made) or 'nothing'}")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        raise CalibrationError(
            f"{where}: input_ids must be whole numbers in rows of one length; pad them, or give an input for "
            "each conversation"
        )
    made["input_ids"] = ids = ids.long().reshape(-1, ids.shape[-1])
    if int(ids.min()) < 0:
        raise CalibrationError(f"{where} holds the token id {int(ids.min())}")
    mask = made.get("attention_mask")
    if mask is not None:
        made["attention_mask"] = mask = mask.reshape(-1, mask.shape[-1]).long()
        if mask.shape != ids.shape or not bool(mask.any(1).all()):
            raise CalibrationError(
                f"{where}: attention_mask must have the shape of input_ids, {tuple(ids.shape)}, and a real "
                "token in every row"
            )
    return ModelInputs(made)


def _tensors(value: Any, where: str) -> Any:
    """`value` with its numbers in tensors on the CPU; a list of unlike things stays a list."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (list, tuple, np.ndarray, int, float)):
        try:
            return torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(value, (list, tuple)) and all(
                isinstance(v, (Tensor, np.ndarray, list)) for v in value
            ):
                return [_tensors(entry, where) for entry in value]
            raise CalibrationError(
                f"{where} is not made of tensors ({first_line(error)}); call the processor with "
                'return_tensors="pt"'
            ) from error
    return value


def _add(digest: hashlib._Hash, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        digest.update(str(len(value)).encode())
        for entry in value:
            _add(digest, entry)
    else:
        digest.update(repr(value).encode())

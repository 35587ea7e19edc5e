"""A saved checkpoint read under the names of the model it was made from: each tensor as float values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from awq.errors import CorruptFileError
from awq.model.quantized import QuantizedCheckpoint, quantization_entry
from awq.model.skeleton import Skeleton
from awq.model.weights import CheckpointReader, read_json


class SavedReader(CheckpointReader):
    """The tensors of a checkpoint that was made from a model, under that model's keys.

    Quantized layers are read as the values that their codes stand for, float32; all else as it is saved.

    Args:
        folder: the checkpoint, quantized or of plain weights.
        original: the model that it was made from.
    """

    def __init__(self, folder: Path, original: Skeleton) -> None:
        super().__init__(folder)
        self._transposed = original.transposed
        entry = quantization_entry(folder, read_json(folder / "config.json"))
        self._codes = None if entry is None else QuantizedCheckpoint(folder)
        views = original.reader.views
        for source in {view.source for view in views.values()} & set(self.tensors):
            self.split(source, {name: view for name, view in views.items() if view.source == source})

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """See `CheckpointReader.read`.

        Raises:
            CorruptFileError: a tensor is there neither as it was nor quantized.
        """
        # Codes may have the name of the weight that they stand for: MLX's do.
        coded = set() if self._codes is None else {f"{layer}.weight" for layer in self._codes.layers}
        yield from super().read([key for key in keys if key in self.tensors and key not in coded])
        for key in keys:
            if key in self.tensors and key not in coded:
                continue
            layer = key.removesuffix(".weight")
            if self._codes is None or key not in coded:
                raise CorruptFileError(f"{self.folder} lacks {key}, which the original model has")
            values = self._codes.values(layer)
            yield key, values.t().contiguous() if key in self._transposed else values


def saved_as(original: Skeleton, folder: Path) -> Skeleton:
    """The same modules, with weights from a checkpoint that was made from the model."""
    return dataclasses.replace(original, reader=SavedReader(folder, original))

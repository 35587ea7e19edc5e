"""What a model does behind its blocks: the last norm, the output layer, whatever scales or caps the logits.

The model itself runs, with stand-ins for its blocks, the last of which answers with the given hidden states.
So every architecture has its own way, and no weight of a block or of an embedding is needed for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import StructureError, first_line
from awq.model.around import AllThere, StandIn, answered, in_place_of_blocks, loaded, outside
from awq.model.skeleton import Skeleton


class Tail:
    """The end of a model, for the time of a `with` block.

    Args:
        skeleton: the opened model.
        list_name: the name of its list of blocks.
        device: where it runs.
        more: what its blocks answer beside the states, see `DryPass.more`.
    """

    def __init__(self, skeleton: Skeleton, list_name: str, device: torch.device, more: int | None) -> None:
        self._skeleton, self._list_name, self._device, self._more = skeleton, list_name, device, more
        self._ways = contextlib.ExitStack()
        # Embeddings answer with zeros where the model lets them; else everything is loaded.
        self._whole = False

    def __enter__(self) -> Tail:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._ways.close()

    def _open(self) -> None:
        around = outside(self._skeleton.model, self._list_name, head=True)
        tables = [module for _, module in around if isinstance(module, nn.Embedding)]
        lazily = [(name, module) for name, module in around if not isinstance(module, nn.Embedding)]
        self._ways.close()
        if self._whole:
            self._ways.enter_context(loaded(self._skeleton, around, self._device, around))
        else:
            self._ways.enter_context(loaded(self._skeleton, lazily, self._device, []))
            self._ways.enter_context(_without_values(tables))

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits float32 `[batch, tokens, vocabulary]` behind the last block.

        Args:
            ids: int64 `[batch, tokens]`, the tokens that the states belong to.
            hidden: float32 `[…, batch, tokens, width]`.

        Raises:
            StructureError: the model cannot be run in this way.
        """
        try:
            return self._run(ids, hidden)
        except Exception as error:  # the model's own code, anything may come
            if self._whole:
                name = type(self._skeleton.model).__name__
                raise StructureError(
                    f"{name} cannot be run behind its blocks: {first_line(error)}"
                ) from error
        self._whole = True
        self._open()
        return self.logits(ids, hidden)

    @torch.no_grad()
    def _run(self, ids: Tensor, hidden: Tensor) -> Tensor:
        model = self._skeleton.model
        blocks = list(model.get_submodule(self._list_name).children())
        states = hidden.to(self._device)
        stand_ins = [_Answer(block, states, self._more) for block in blocks]
        with in_place_of_blocks(model, self._list_name, stand_ins), AllThere():
            output = model(input_ids=ids.to(self._device), use_cache=False)
        logits = output.logits if hasattr(output, "logits") else output[0]
        return logits.float()


class _Answer(StandIn):
    """Answers with the same states whatever it is given."""

    def __init__(self, block: nn.Module, states: Tensor, more: int | None) -> None:
        super().__init__(block)
        self._states, self._more = states, more

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The states."""
        return answered(self._states, self._more)


@contextlib.contextmanager
def _without_values(tables: Sequence[nn.Embedding]) -> Iterator[None]:
    """Within a `with` block, embeddings answer with zeros, and need no weights."""

    def zeros(width: int) -> Any:
        return lambda ids, *args, **kwargs: torch.zeros(*ids.shape, width, device=ids.device)

    for table in tables:
        table.forward = zeros(table.embedding_dim)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for table in tables:
            del table.forward

"""A folder that answers as the transformers model in it, which is loaded when that is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq.hf import is_awq, load_float, load_quantized
from awq.model.fetch import load_processor
from awq.model.weights import read_json

if TYPE_CHECKING:
    from typing import Self


class FolderModel:
    """What is not defined here is looked up in the transformers model, which is loaded for it.

    Args:
        folder: a float model, or a quantized one.
        trust_remote_code: run modelling code that comes with the model.
        loading: arguments of transformers' `from_pretrained`.
    """

    def __init__(self, folder: Path, trust_remote_code: bool, loading: dict[str, Any]) -> None:
        self._folder, self._trust, self._loading = folder, trust_remote_code, loading
        self._result: Path | None = None  # what has been made of it
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The transformers model, loaded when first asked for."""
        if self._model is None:
            folder = self._place()
            load = load_quantized if is_awq(folder) else load_float
            self._model = load(folder, trust_remote_code=self._trust, **self._loading)
        return self._model

    @property
    def config(self) -> Any:
        """The transformers configuration of the model; its weights are not loaded for it."""
        if self._model is not None:
            return self._model.config
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._place(), trust_remote_code=self._trust)

    @property
    def model_type(self) -> str:
        """`model_type` of config.json."""
        return str(read_json(self._place() / "config.json").get("model_type"))

    @property
    def processor(self) -> Any:
        """The processor of a model that takes more than text; None for others."""
        folder = self._place()
        if not any(
            (folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json")
        ):
            return None
        return load_processor(folder, self._trust)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the transformers model. `max_seq_len` is taken for its `max_length`."""
        if "max_seq_len" in kwargs:
            limit = kwargs.pop("max_seq_len")
            if kwargs.get("max_new_tokens") is None:
                kwargs.setdefault("max_length", limit)
        return self.model.generate(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformers model's output."""
        return self.model(*args, **kwargs)

    __call__ = forward

    def to(self, device: Any) -> Any:
        """The transformers model, moved to a device."""
        return self.model.to(device)

    def eval(self) -> Self:
        """This model in evaluation mode, which it is in from the start."""
        if self._model is not None:
            self._model.eval()
        return self

    def train(self, mode: bool = True) -> Self:
        """This model in training mode, or not."""
        self.model.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.model, name)

    def _place(self) -> Path:
        """The folder that holds the model as it is now."""
        return self._result or self._folder

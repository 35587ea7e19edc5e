"""From a name to a folder: local folders as they are, hub names through huggingface_hub's cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from awq.errors import LoadError, MissingDependencyError, MissingFileError, first_line

# What a model consists of here; pickled and foreign weights are not fetched.
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*"]


def resolve(model: str | Path, revision: str | None = None, options: Mapping[str, Any] | None = None) -> Path:
    """The folder of a model.

    Args:
        model: a folder, or `owner/name` on the hub.
        revision: branch, tag or commit on the hub.
        options: further ones of `huggingface_hub.snapshot_download` (`token`, `cache_dir`, …).

    Raises:
        MissingFileError: no such folder, and the hub does not have it or cannot be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MissingFileError(f"{name} is neither a folder nor the name of a model on the hub (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, **{"revision": revision, "allow_patterns": _PATTERNS, **(options or {})})
        )
    except Exception as error:  # the hub's client raises many kinds
        raise MissingFileError(
            f"{name} is no folder here, and fetching it from the hub failed: {first_line(error).rstrip('.')}"
        ) from error


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        LoadError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise many kinds
        reason = first_line(error).rstrip(".")
        raise LoadError(
            f"{folder} has no tokenizer that can be loaded: {reason}; put the original model's "
            "tokenizer files there, or give token ids instead of text"
        ) from error


def load_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """The processor of a model folder: what turns images and text into the model's inputs.

    Raises:
        MissingDependencyError: it needs a package that is not installed.
        LoadError: there is none that can be loaded.
    """
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise MissingDependencyError(f"the processor of {folder} needs more: {reason}") from error
    except Exception as error:  # processors raise many kinds
        reason = first_line(error).rstrip(".")
        if find_spec("torchvision") is None:
            # transformers stumbles over its absence in many ways, few of which name it.
            reason = f"{reason} (torchvision, which many processors need, is not installed)"
        raise LoadError(
            f"{folder} has no processor that can be loaded: {reason}; the original model's belongs there "
            "(processor_config.json, preprocessor_config.json, chat_template.*)"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise LoadError(
            f"{folder} has no processor for images (processor_config.json or preprocessor_config.json)"
        )
    return processor


class Lazily:
    """The model's own tokenizer or processor, loaded when it has work to do: token ids need none."""

    def __init__(self, load: Callable[[Path, bool], Any], folder: Path, trust_remote_code: bool) -> None:
        self._load, self._folder, self._trust = load, folder, trust_remote_code
        self._loaded: Any = None

    def _get(self) -> Any:
        if self._loaded is None:
            self._loaded = self._load(self._folder, self._trust)
        return self._loaded

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As what is loaded answers."""
        return self._get()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._get(), name)

    def __len__(self) -> int:
        return len(self._get())

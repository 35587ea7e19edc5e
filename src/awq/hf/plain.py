"""Load a float checkpoint whole: transformers itself only reports the weights it made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from awq.errors import LoadError
from awq.model.classes import auto_class
from awq.model.weights import CheckpointReader


def load_float(folder: Path, **kwargs: Any) -> Any:
    """A float model in eval mode.

    Args:
        folder: a model folder.
        **kwargs: of transformers' `from_pretrained`.

    Raises:
        MissingFileError, CorruptFileError: files are missing or damaged.
        LoadError: transformers cannot load it, or a weight is missing.
    """
    from transformers import AutoConfig

    CheckpointReader(folder)
    trust = kwargs.get("trust_remote_code", False)
    try:
        config = kwargs.get("config") or AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        maker = auto_class(config, trust)
        loaded, info = maker.from_pretrained(folder, output_loading_info=True, **kwargs)
    except (ValueError, OSError, RuntimeError, KeyError, ImportError) as error:
        raise LoadError(f"transformers cannot load {folder}: {error}") from error
    if info["missing_keys"]:
        raise LoadError(f"{folder} lacks weights: {', '.join(sorted(info['missing_keys'])[:10])}")
    return loaded.eval()

"""The tokens of an evaluation text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq.calibration import read_text
from awq.errors import CalibrationError


def token_ids(source: str | Path, tokenizer: Any) -> Tensor:
    """Tokens of a text, tokenized once, int64 `[tokens]`.

    Args:
        source: `bundled`, or a .txt, .jsonl or .json file (documents are joined by blank lines).
        tokenizer: a transformers tokenizer.

    Raises:
        MissingFileError, CalibrationError: the text cannot be read, or is empty.
    """
    text = read_text(str(source))
    if not text.strip():
        raise CalibrationError(f"{source} holds no text")
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)

"""The tokens of an evaluation text: as one running text, or document by document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awq.calibration import read_documents, read_text
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
    return _tokens(text, tokenizer)


def document_ids(source: str | Path, tokenizer: Any) -> list[Tensor]:
    """Tokens of each document by itself, int64 `[tokens]` each, blank ones left out.

    Args: as for `token_ids`; a text file without separators is one document.

    Raises:
        MissingFileError, CalibrationError: the text cannot be read, or is empty.
    """
    documents = [_tokens(text, tokenizer) for text in read_documents(str(source)) if text.strip()]
    if not documents:
        raise CalibrationError(f"{source} holds no text")
    return documents


def _tokens(text: str, tokenizer: Any) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)

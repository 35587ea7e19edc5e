"""Token samples for calibration: every document its own, cut on purpose, counted honestly.

A text file is one long running text; windows are taken evenly over all of it. Documents (rows of jsonl or of
a data set, entries of a list) are never glued to one another: a long one is cut in windows, a short one stays
short. What is cut off is counted and told.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from awq.calibration.sources import Documents, open_source
from awq.errors import CalibrationError, ConfigError


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    """Samples ready to run.

    Args:
        samples: int64 `[tokens]` each, on the CPU.
        source: where they come from, for a person.
        documents: documents that gave at least one sample.
        unused_tokens: tokens read but left out (cut off, or beyond the number of samples asked for).
    """

    samples: tuple[Tensor, ...]
    source: str
    documents: int
    unused_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of all samples; each counts in the statistics."""
        return sum(len(sample) for sample in self.samples)

    def fingerprint(self) -> str:
        """A hash of every sample's tokens and bounds."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample).to_bytes(8, "little"))
            digest.update(sample.contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def describe(self) -> str:
        """One sentence for a person."""
        longest = max(len(sample) for sample in self.samples)
        return (
            f"{len(self.samples)} samples of up to {longest} tokens, {self.tokens:,} tokens in all, "
            f"from {self.source}; {self.unused_tokens:,} tokens read and not used"
        )


def load_calibration(
    source: Any,
    tokenizer: Any,
    *,
    samples: int = 128,
    seq_len: int = 512,
    split: str | None = None,
    text_column: str = "text",
    long: Literal["split", "truncate"] = "split",
) -> CalibrationSet:
    """Make calibration samples.

    Args:
        source: `bundled`; a .txt, .jsonl or .json file; `pileval`, `wikitext` or a hub data set
            (`owner/name` or `owner/name:config`); a folder written by `datasets.save_to_disk`; or a list of
            texts, of token ids, or of chats (lists of `{"role", "content"}`).
        tokenizer: called on texts with its own defaults, so documents start as it starts them.
        samples: at most this many.
        seq_len: tokens of a sample at most.
        split, text_column: of a data set.
        long: cut a long document in windows (`split`), or keep its beginning (`truncate`).

    Raises:
        CalibrationError: nothing usable comes of the source.
        ConfigError: an option has no meaning.
        MissingFileError: a file does not exist.
    """
    if samples < 1 or seq_len < 1:
        raise ConfigError(f"samples={samples} and seq_len={seq_len} must be at least 1")
    if long not in ("split", "truncate"):
        raise ConfigError(f"long={long!r} is unknown; choose split or truncate")
    documents = open_source(source, split=split, text_column=text_column)
    ids = (_token_ids(item, tokenizer, documents.name) for item in documents.items)
    if documents.running_text:
        return _windows_of_text(torch.cat(list(ids)), samples, seq_len, documents.name)
    return _windows_of_documents(ids, samples, seq_len, long, documents)


def _windows_of_text(ids: Tensor, samples: int, seq_len: int, name: str) -> CalibrationSet:
    """Windows spread evenly over a running text; a text shorter than a window is one sample."""
    if len(ids) == 0:
        raise CalibrationError(f"{name} gives no tokens; give a text file with text in it")
    windows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len) if len(ids) >= seq_len else ids[None]
    count = min(samples, len(windows))
    chosen = [i * len(windows) // count for i in range(count)]
    return CalibrationSet(
        tuple(windows[i].clone() for i in chosen), name, 1, len(ids) - count * windows.shape[1]
    )


def _windows_of_documents(
    ids: Iterable[Tensor], samples: int, seq_len: int, long: str, documents: Documents
) -> CalibrationSet:
    """Windows of one document after another until there are enough."""
    found: list[Tensor] = []
    used = unused = 0
    for document in ids:
        windows = [w for w in document.split(seq_len) if len(w)] if len(document) else []
        if long == "truncate":
            windows = windows[:1]
        kept = windows[: samples - len(found)]
        used += bool(kept)
        unused += len(document) - sum(len(window) for window in kept)
        found += [window.clone() for window in kept]
        if len(found) == samples:
            break
    if not found:
        raise CalibrationError(f"{documents.name} gives no tokens; give text, or the bundled source")
    return CalibrationSet(tuple(found), documents.name, used, unused)


def _token_ids(item: Any, tokenizer: Any, name: str) -> Tensor:
    """One document's tokens, int64 `[tokens]`; texts and chats are tokenized, token ids are checked."""
    if isinstance(item, str):
        if not item.strip():
            return torch.zeros(0, dtype=torch.long)
        return torch.tensor(tokenizer(item, verbose=False)["input_ids"], dtype=torch.long)
    if isinstance(item, Tensor) or (isinstance(item, Sequence) and all(isinstance(i, int) for i in item)):
        ids = torch.as_tensor(item, dtype=torch.long).flatten()
        if len(ids) and int(ids.min()) < 0:
            raise CalibrationError(f"{name} holds the token id {int(ids.min())}; ids start at 0")
        return ids
    if isinstance(item, Sequence) and all(isinstance(i, dict) and "content" in i for i in item):
        try:
            text = tokenizer.apply_chat_template(item, tokenize=False)
        except ValueError as error:
            raise CalibrationError(
                f"{name} holds chats, and the tokenizer cannot format them: {error}"
            ) from error
        # The template has written the special tokens already.
        return torch.tensor(
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
        )
    raise CalibrationError(
        f"{name} holds a {type(item).__name__}; give texts, lists of token ids, or lists of chat messages"
    )

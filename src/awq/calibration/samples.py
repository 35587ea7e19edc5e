"""Token samples for calibration: every document its own, cut on purpose, counted honestly.

A text file is one long running text: it is tokenized as a whole, and windows are taken evenly over it all.
Documents (rows of jsonl or of a data set, entries of a list) are never glued to one another: a long one is
cut in windows, a short one stays short. Padding or gluing would be simpler to batch, and would measure
activations that the model never sees in use.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from awq.calibration.chats import conversation, has_media
from awq.calibration.inputs import ModelInputs, model_inputs
from awq.calibration.sources import Documents, open_source
from awq.errors import AwqError, CalibrationError, ConfigError, first_line

Sample = Tensor | ModelInputs


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    """Samples ready to run.

    Args:
        samples: int64 `[tokens]` each, 1 to `seq_len` tokens long, on the CPU; or, with images, the input
            that a processor made, which is taken whole.
        source: where they come from, for a person.
        documents: documents that gave at least one sample; 1 for a running text.
        truncated_tokens: tokens of those documents that are in no sample: cut off with `long="truncate"`, or
            left over in the last document when there were samples enough. 0 for a running text, which is
            sampled and not cut.
        spare: further samples of text, which are in none of the others.
    """

    samples: tuple[Sample, ...]
    source: str
    documents: int
    truncated_tokens: int = 0
    spare: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all samples; each counts in the statistics."""
        return sum(len(sample) for sample in self.samples)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over every sample's length, token ids and images, in order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            if isinstance(sample, ModelInputs):
                sample.add_to(digest)
                continue
            digest.update(len(sample).to_bytes(8, "little"))
            digest.update(sample.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One sentence for a person."""
        rows = [row for sample in self.samples for row in rows_of(sample)]
        longest = max(map(len, rows))
        images = sum(isinstance(sample, ModelInputs) for sample in self.samples)
        name = f"{self.source} ({_count(images, 'input')} with images)" if images else self.source
        cut = f"; {_count(self.truncated_tokens, 'token')} dropped" if self.truncated_tokens else ""
        return (
            f"{_count(len(rows), 'sample')} of up to {_count(longest, 'token')}, "
            f"{_count(self.tokens, 'token')} in all, from {name}{cut}"
        )


def rows_of(sample: Sample) -> list[Tensor]:
    """The token ids of a sample, int64 `[tokens]` for each of its conversations."""
    return sample.rows if isinstance(sample, ModelInputs) else [sample]


def load_calibration(
    source: str | Path | Sequence[Any] | Mapping[str, Any],
    tokenizer: Any,
    *,
    processor: Any = None,
    samples: int = 128,
    seq_len: int = 512,
    split: str | None = None,
    text_column: str = "text",
    long: Literal["split", "truncate"] = "split",
    seed: int = 42,
    vocab_size: int | None = None,
    spare: int = 0,
) -> CalibrationSet:
    """Make calibration samples.

    A .txt file (and `bundled`) is one running text; its windows are spread evenly over it. Everything else,
    and a .txt file with `<|endoftext|>` between its documents, is documents, taken in their order (a data
    set's after a seeded shuffle) until there are enough samples; blank ones are passed over. The tokenizer
    starts a text as it does by default (with `<s>`, where it does that): once per document or running text,
    never again at each window.

    Chats with images, and what a processor made of some, are taken whole, however many tokens they have.

    Args:
        source: `bundled`; a .txt, .jsonl or .json file; `pileval`, `wikitext`, or a hub data set
            (`owner/name` or `owner/name:config`); a data set's folder; what a processor returned, or a list
            of such; or a list of texts, of token ids, or of chats (lists of `{"role", "content"}`).
        tokenizer: a transformers tokenizer; None will do for token ids.
        processor: a transformers processor, for chats with images.
        samples: at most this many.
        seq_len: tokens of a sample at most.
        split: of a data set; `train` by default, `validation` for `pileval`.
        text_column: of data sets and of jsonl rows; rows may hold chats under `messages` instead.
        long: cut a long document in windows (`split`), or keep its beginning (`truncate`).
        seed: of a data set's shuffle; 42 is AutoAWQ's.
        vocab_size: token ids given as such must be below it; by default the tokenizer's size, if it tells.
        spare: set aside as many further samples of text at most, as far as there are some to be had.

    Raises:
        CalibrationError: the source cannot be read, or nothing usable comes of it.
        ConfigError: an option has no meaning.
        MissingDependencyError: a data set was asked for, and `datasets` is not installed.
        MissingFileError: a file does not exist.
    """
    if samples < 1 or seq_len < 1:
        raise ConfigError(f"samples={samples} and seq_len={seq_len} must both be at least 1")
    if long not in ("split", "truncate"):
        raise ConfigError(f"long={long!r} is unknown; choose split or truncate")
    documents = open_source(source, split=split, text_column=text_column, seed=seed)
    reader = _Reader(tokenizer, processor, documents, vocab_size)
    if documents.running_text:
        ids = torch.cat([reader.token_ids(item) for item in documents.items])
        return _of_running_text(ids, samples, seq_len, documents.name, spare)
    return _of_documents(reader.read(), samples, seq_len, long, documents.name, spare)


def _of_running_text(ids: Tensor, samples: int, seq_len: int, name: str, spare: int) -> CalibrationSet:
    """Windows spread evenly over a running text; its shorter tail only where all of it is wanted anyway."""
    if not len(ids):
        raise CalibrationError(f"{name} holds no text; give a file with text in it, or use `bundled`")
    windows = list(ids.split(seq_len))
    others: list[Tensor] = []
    if len(windows) > samples:
        whole = [window for window in windows if len(window) == seq_len]
        taken = [i * len(whole) // samples for i in range(samples)]
        windows = [whole[place] for place in taken]
        left = sorted(set(range(len(whole))) - set(taken))
        count = min(spare, len(left))
        others = [whole[left[i * len(left) // count]].clone() for i in range(count)]
        name = f"{name} (windows spread evenly over {len(ids):,} tokens)"
    return CalibrationSet(tuple(window.clone() for window in windows), name, documents=1, spare=tuple(others))


def _of_documents(
    documents: Iterable[Sample], samples: int, seq_len: int, long: str, name: str, spare: int
) -> CalibrationSet:
    """Windows of one document after another until there are enough; inputs with images count by rows."""
    found: list[Sample] = []
    left: tuple[Tensor, ...] = ()
    used = dropped = count = 0
    documents = iter(documents)
    for document in documents:
        if not len(document):
            continue
        used += 1
        if isinstance(document, ModelInputs):
            found.append(document)
            count += len(document.input_ids)
        else:
            windows = document.split(seq_len)
            kept = windows[: 1 if long == "truncate" else samples - count]
            dropped += len(document) - sum(len(window) for window in kept)
            found += [window.clone() for window in kept]
            left = windows[len(kept) :]
            count += len(kept)
        if count >= samples:
            break
    if not found:
        raise CalibrationError(f"{name}: no document holds any text; give some, or use `bundled`")
    others = _further(left, documents, seq_len, spare)
    return CalibrationSet(tuple(found), f"{_count(used, 'document')} of {name}", used, dropped, others)


def _further(
    left: Iterable[Tensor], documents: Iterator[Sample], seq_len: int, count: int
) -> tuple[Tensor, ...]:
    """Windows of what is left of a document, then the beginnings of those behind it, as far as they go."""
    out = [window.clone() for window in left][:count]
    try:
        while len(out) < count:
            document = next(documents)
            if isinstance(document, ModelInputs):
                break
            if len(document):
                out.append(document[:seq_len].clone())
    except (StopIteration, AwqError):
        pass  # a bad row behind those that are needed hurts nobody
    return tuple(out)


class _Reader:
    """Turns documents, whatever their kind, into token ids and inputs with images."""

    def __init__(self, tokenizer: Any, processor: Any, documents: Documents, vocab_size: int | None) -> None:
        self._tokenizer, self._processor, self._documents = tokenizer, processor, documents
        self._name, self._vocab_size = documents.name, vocab_size

    def read(self) -> Iterator[Sample]:
        """All documents; one that a tokenizer or a processor has read already may stand for several."""
        for number, item in enumerate(self._documents.items, start=1):
            if isinstance(item, Mapping):
                made = model_inputs(item, f"{self._name}, number {number}")
            elif _all_of(item, dict) and has_media(item):
                made = self._conversation(item, number)
            else:
                yield self.token_ids(item)
                continue
            if made.is_text:
                yield from map(self._checked, made.rows)
            else:
                yield made

    def token_ids(self, item: Any) -> Tensor:
        """One document's tokens, int64 `[tokens]`; none for a blank text."""
        if isinstance(item, str):
            return self._tokenize(item, add_special_tokens=True)
        if isinstance(item, (Tensor, np.ndarray)) or _all_of(item, int):
            return self._checked(item)
        if _all_of(item, dict):
            return self._chat(item)
        raise CalibrationError(
            f"{self._name}: a document cannot be {_kind(item)}; give texts, lists of token ids, lists of "
            'chat messages ({"role": …, "content": …}), or what a processor returns'
        )

    def _conversation(self, messages: Any, number: int) -> ModelInputs:
        if self._processor is None:
            raise ConfigError(f"{self._name} holds images, which need the model's processor")
        where = f"{self._name}, number {number}"
        return conversation(messages, self._processor, self._documents.folder, where)

    def _tokenize(self, text: str, add_special_tokens: bool) -> Tensor:
        if not text.strip():
            return torch.zeros(0, dtype=torch.long)
        if self._tokenizer is None:
            raise ConfigError(f"{self._name} holds text, which needs a tokenizer")
        # A tokenizer warns about texts longer than the model's context: windows are cut afterwards.
        encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return torch.tensor(encoded["input_ids"], dtype=torch.long)

    def _chat(self, messages: Any) -> Tensor:
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False)
        except Exception as error:  # templates are programs, and raise what they like
            text = self._formatted(messages)
            if text is None:
                raise CalibrationError(
                    f"{self._name} holds chats, and the tokenizer cannot format one: {first_line(error)}"
                ) from error
        # The template has written the special tokens already.
        return self._tokenize(text, add_special_tokens=False)

    def _formatted(self, messages: Any) -> str | None:
        """A chat as the processor writes it, which in some folders alone has the template."""
        try:
            return self._processor.apply_chat_template(list(messages), tokenize=False)
        except Exception:  # there is no processor, or it has no template either
            return None

    def _checked(self, item: Any) -> Tensor:
        try:
            ids = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CalibrationError(
                f"{self._name}: token ids must be whole numbers of 64 bits ({first_line(error)})"
            ) from error
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]  # as tokenizers return it with return_tensors="pt"
        if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() != 1):
            raise CalibrationError(
                f"{self._name}: token ids must be one row of whole numbers, not {ids.dtype} of shape "
                f"{tuple(ids.shape)}"
            )
        ids = ids.flatten().to(device="cpu", dtype=torch.long)
        limit = self._limit()
        if len(ids) and (int(ids.min()) < 0 or (limit is not None and int(ids.max()) >= limit)):
            bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            known = "" if limit is None else f"; the vocabulary ends at {limit - 1}"
            raise CalibrationError(f"{self._name} holds the token id {bad}{known}")
        return ids

    def _limit(self) -> int | None:
        if self._vocab_size is None and self._tokenizer is not None:
            try:
                self._vocab_size = len(self._tokenizer)
            except Exception:  # a model without a tokenizer can still be given token ids
                return None
        return self._vocab_size


def _all_of(item: Any, kind: type) -> bool:
    """Whether `item` is a list or tuple of `kind`; an empty one is a document without tokens."""
    return isinstance(item, (list, tuple)) and all(
        isinstance(entry, kind) and not isinstance(entry, bool) for entry in item
    )


def _kind(item: Any) -> str:
    if isinstance(item, (list, tuple)):
        return f"a {type(item).__name__} of {' and '.join(sorted({type(entry).__name__ for entry in item}))}"
    return f"of type {type(item).__name__}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

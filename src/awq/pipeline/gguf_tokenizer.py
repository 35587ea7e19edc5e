"""A tokenizer as GGUF metadata.

llama.cpp has the tokenizers' algorithms built in and is told which one by name: `gpt2` for byte-level BPE,
with a second name for the regular expression that cuts the text first, and `llama` for SentencePiece. What is
not known to be the same is refused: a model with a nearly right tokenizer is worse than none.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from awq.errors import ConfigError
from awq.model.weights import read_json

_LETTERS_AND_REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# Regular expressions of byte-level BPE tokenizers, by llama.cpp's names for them.
_PRE_TOKENIZERS = {
    _LETTERS_AND_REST.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe",
    _LETTERS_AND_REST.replace("DIGITS", r"\p{N}"): "qwen2",
}


def add_tokenizer(package: Any, writer: Any, folder: Path, vocabulary: int) -> None:
    """Write a model folder's tokenizer into a GGUF file's metadata.

    Args:
        package: the gguf package.
        writer: its writer.
        folder: the model folder, with a `tokenizer.json`.
        vocabulary: rows of the embeddings; ids without a token are filled up.

    Raises:
        MissingFileError: there is no `tokenizer.json`.
        ConfigError: llama.cpp is not known to have this tokenizer.
    """
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise ConfigError(f"{folder}: GGUF export knows BPE tokenizers, not {model.get('type')}")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_prefix(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tokenizer, folder))
    tokens, kinds = _tokens(package.TokenType, tokenizer, vocabulary)
    writer.add_token_list(tokens)
    if model.get("byte_fallback"):
        writer.add_token_scores(_scores(tokens, merges))
    writer.add_token_types(kinds)
    # It warns about templates for pairs of texts, which no language model uses.
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
    special = package.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=vocabulary)
    special.add_special_token = _ends(folder)
    special.add_to_gguf(writer, quiet=True)


def _tokens(kinds: Any, tokenizer: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Text and kind of each id."""
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [int(kinds.UNUSED)] * vocabulary
    for text, index in tokenizer["model"]["vocab"].items():
        byte = text.startswith("<0x") and text.endswith(">") and len(text) == 6
        tokens[index], types[index] = text, int(kinds.BYTE if byte else kinds.NORMAL)
    unknown = tokenizer["model"].get("unk_token")
    for added in tokenizer.get("added_tokens") or ():
        kind = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
        if added["content"] == unknown:
            kind = kinds.UNKNOWN
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece joins the pair whose result scores best: an earlier merge must score higher."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        scores.setdefault("".join(pair), -float(rank))
    return [scores.get(token, 0.0) for token in tokens]


def _space_prefix(tokenizer: dict[str, Any]) -> bool:
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    pre = tokenizer.get("pre_tokenizer") or {}
    return any(step.get("type") == "Prepend" for step in steps) or pre.get("prepend_scheme") in (
        "first",
        "always",
    )


def _pre_tokenizer(tokenizer: dict[str, Any], folder: Path) -> str:
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    if [step.get("type") for step in steps] == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if [step.get("type") for step in steps] == ["Split", "ByteLevel"]:
        name = _PRE_TOKENIZERS.get((steps[0].get("pattern") or {}).get("Regex", ""))
        if name:
            return name
    raise ConfigError(
        f"{folder}: llama.cpp is not known to have this model's pre-tokenizer; export fp16, and use "
        "llama.cpp's own converter"
    )


def _ends(folder: Path) -> dict[str, bool]:
    """Whether the tokenizer puts its first and last token around a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    count = len(plain)
    return {
        "bos": framed[0] == tokenizer.bos_token_id and framed[1 : 1 + count] == plain,
        "eos": framed[-1] == tokenizer.eos_token_id and framed[-1 - count : -1] == plain,
    }

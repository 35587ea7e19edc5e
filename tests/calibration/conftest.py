"""A tokenizer whose tokens can be counted by eye."""

from __future__ import annotations

from typing import Any

import pytest


class Letters:
    """One token for each character (its code point), and `START` in front of a text."""

    START = 1

    def __len__(self) -> int:
        return 0x110000

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        start = [self.START] if add_special_tokens else []
        return {"input_ids": start + [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool = True) -> str:
        assert not tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


@pytest.fixture
def letters() -> Letters:
    return Letters()

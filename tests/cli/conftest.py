"""The command line as it is really run: through `run()`, with its exit code and both streams."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Result(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The whole standard output as JSON, which knows no NaN."""
        return json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


Awq = Callable[..., Result]


@pytest.fixture(autouse=True)
def short_books(monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of the bundled books: tokenizing all of them would take most of each test's time."""
    from awq.calibration import sources

    real = sources.bundled_text
    monkeypatch.setattr(sources, "bundled_text", lambda name: real(name)[:50_000])


@pytest.fixture
def awq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Awq:
    """Runs a command line."""
    from awq.cli.main import run

    monkeypatch.setenv("COLUMNS", "200")

    def awq(*arguments: object) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["awq", *map(str, arguments)])
        code: Any = 0
        try:
            run()
        except SystemExit as end:
            code = end.code or 0
        return Result(code, *capsys.readouterr())

    return awq


@pytest.fixture(scope="session")
def original(tiny: Any, books6m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a real tokenizer; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("cli") / "original"
    tiny("llama", num_key_value_heads=2, vocab_size=4096, pad_token_id=0, eos_token_id=0).save_pretrained(
        folder
    )
    for file in books6m.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def quantized(original: Path) -> Path:
    """The same, quantized in groups of 32."""
    from awq import QuantConfig
    from awq.pipeline import quantize

    out = original.parent / "quantized"
    quantize(original, out, QuantConfig(group_size=32, scale_steps=3), samples=4, seq_len=32)
    return out

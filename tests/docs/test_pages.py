"""The pages and the README do what they say: every block runs, every link leads somewhere.

A page runs in a fresh folder that holds a copy of the bundled model as `books6m`. Its ```python blocks run in
order in one namespace, its ```bash blocks with `bash -e` and the `awq` command, all in the order of the page.
Blocks in any other language are not run, nor is one that follows `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n\s*)?"
    r"^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)$",
    re.M | re.S,
)
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?P<target>[^)\s]+)\)")


class Block(NamedTuple):
    language: str
    code: str
    line: int
    reason: str | None


def blocks_of(text: str) -> list[Block]:
    return [
        Block(
            match["language"], match["code"], text.count("\n", 0, match.start("fence")) + 2, match["reason"]
        )
        for match in _FENCE.finditer(text)
    ]


def runnable(text: str) -> list[Block]:
    return [
        block for block in blocks_of(text) if block.reason is None and block.language in ("python", "bash")
    ]


@pytest.fixture
def page_folder(tmp_path: Path, books6m: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh current folder with the model, and the `awq` command of this interpreter on PATH."""
    shutil.copytree(books6m, tmp_path / "books6m")
    command = tmp_path / ".bin" / "awq"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m awq.cli.main "$@"\n')
    command.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.mark.timeout(900)  # a page's commands quantize several times, beside other tests
@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable(page.read_text("utf-8"))], ids=lambda page: page.name
)
def test_every_block_of_a_page_runs(page: Path, page_folder: Path) -> None:
    if "PIL" in page.read_text("utf-8"):
        pytest.importorskip("PIL", reason="the page opens images, which needs Pillow")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in runnable(page.read_text("utf-8")):
        where = f"{page.name}, line {block.line}"
        if block.language == "bash":
            done = subprocess.run(
                ["bash", "-e", "-c", block.code], cwd=page_folder, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{where}:\n{done.stdout}\n{done.stderr}"
        else:
            # Lines of an error are those of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text("utf-8"))
    for match in _LINK.finditer(text):
        target = match["target"]
        if re.match(r"\w+:", target):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert file.is_relative_to(ROOT), f"{page.name} links out of the repository: {target}"
        if heading:
            assert heading in anchors(file.read_text("utf-8")), f"{page.name} links to {target}"


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get."""
    titles = re.findall(r"^#+ +(.+?) *$", _FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_a_block_is_passed_over_only_with_a_reason() -> None:
    text = (
        "<!-- not run: needs a GPU -->\n```bash\nfalse\n```\n\n"
        "```python\nx = 1\n```\n\n```console\n$ no\n```\n"
    )
    assert [(b.language, b.line, b.reason) for b in blocks_of(text)] == [
        ("bash", 3, "needs a GPU"),
        ("python", 7, None),
        ("console", 11, None),
    ]
    assert [block.code for block in runnable(text)] == ["x = 1\n"]


@pytest.mark.slow
def test_the_example_scripts_run(page_folder: Path) -> None:
    texts = page_folder / "texts.jsonl"
    texts.write_text('{"text": "The sea was calm, and the wind had gone."}\n' * 6)
    examples = ROOT / "examples"
    quantized = _script(examples / "quantize.py", "books6m", "out", "--samples", "4", "--seq-len", "64")
    assert quantized.count("of plain rounding's error") == 6
    prompt = "The captain looked at the sea and"
    assert _script(examples / "generate.py", "out", prompt).startswith(prompt)
    told = _script(examples / "own_data.py", "books6m", "own", "texts.jsonl")
    assert told.startswith("6 samples")


def test_every_example_script_is_run_here() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        "quantize.py",
        "generate.py",
        "own_data.py",
    }


def _script(script: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

"""The table of architectures in the documentation: written from measurements, and compared with them.

PYTHONPATH=tests python -m zoo.table            # measure everything, write docs/architectures.md
PYTHONPATH=tests python -m zoo.table llama      # measure some, print their rows
"""

from __future__ import annotations

import re
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from awq.hf import load_float
from zoo.build import build
from zoo.coverage import Row, measure
from zoo.text import TEXT
from zoo.vision import BUILDERS, image_inputs

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_BEGIN, _END = "<!-- table: {} -->", "<!-- end of table -->"
SECTIONS = {
    "dense": [name for name in TEXT if not TEXT[name].mixture],
    "mixtures of experts": [name for name in TEXT if TEXT[name].mixture],
    "vision and language": [f"{name} (images)" for name in BUILDERS if not name.endswith("_text")],
}
# Experts of models that take images, as `zoo.text.Architecture` tells of the others.
_FUSED = {
    "llama4": ("experts.gate_up_proj", "experts.down_proj", "columns"),
    "qwen3_vl_moe": ("experts.gate_up_proj", "experts.down_proj", "rows"),
}
HEADER = (
    "architecture",
    "blocks",
    "folds found / proved",
    "folding changes logits by",
    "layers quantized",
    "KL / rounding's",
    "reloaded differs by",
    "remarks",
)
# Columns that hold a measured float, which may differ from machine to machine.
FLOATS = ("folding changes logits by", "KL / rounding's", "reloaded differs by")


def row_of(name: str) -> Row:
    """Measure one architecture of the zoo."""
    with tempfile.TemporaryDirectory() as folder:
        source, work = Path(folder) / "source", Path(folder) / "work"
        work.mkdir()
        if name not in TEXT:
            known = name.removesuffix(" (images)")
            BUILDERS[known](source)
            model = load_float(source, dtype=torch.float32)
            return measure(model, source, work, _FUSED.get(known), partial(image_inputs, known))
        return measure(build(TEXT[name], source), source, work, TEXT[name].fused)


def cells(name: str, row: Row) -> dict[str, str]:
    """A row's cells by column."""
    if row.refused:
        empty = dict.fromkeys(HEADER, "-")
        return empty | {"architecture": name, "remarks": f"refused: {row.refused}"}
    blocks = ", ".join(f"{count} x {kind}" for kind, count in row.kinds)
    values = (
        name,
        blocks,
        f"{row.proposed} / {row.proved}",
        _short(row.change),
        f"{row.quantized} of {row.linears}",
        f"{row.ratio:.2f}",
        _short(row.differs),
        "; ".join(_remarks(row)) or "every layer scaled",
    )
    return dict(zip(HEADER, values, strict=True))


def _short(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _remarks(row: Row) -> list[str]:
    out = []
    others = {name: holder.partition(",")[0] for name, holder in row.others.items()}
    for title, layers in (("not scaled", row.unscaled), ("float", row.floats), ("as it is", others)):
        by_reason: dict[str, dict[str, None]] = {}
        for layer, reason in layers.items():
            names = by_reason.setdefault(_every_expert(reason), {})
            names[f"`{_every_expert(layer)}`"] = None
        out += [f"{title}: {', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    return out


def _every_expert(text: str) -> str:
    """`text` with a star in the place of an expert's number."""
    return re.sub(r"\bexperts\.\d+\.", "experts.*.", text)


def render(rows: list[dict[str, str]]) -> str:
    """A Markdown table."""
    lines = [HEADER, ["---"] * len(HEADER), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def committed(page: Path = PAGE) -> dict[str, dict[str, str]]:
    """The rows that the page holds, by architecture."""
    rows = {}
    text = page.read_text("utf-8")
    for section in SECTIONS:
        begin, end = _span(text, section)
        for line in text[begin:end].strip().splitlines()[2:]:
            values = [cell.strip() for cell in line.strip("|").split(" | ")]
            rows[values[0]] = dict(zip(HEADER, values, strict=True))
    return rows


def _span(text: str, section: str) -> tuple[int, int]:
    """Where a section's table begins and ends in the page."""
    mark = _BEGIN.format(section)
    begin = text.index(mark) + len(mark)
    return begin, text.index(_END, begin)


def write(page: Path = PAGE) -> None:
    """Measure the whole zoo and put the tables into the page."""
    text = page.read_text("utf-8")
    for section, names in SECTIONS.items():
        begin, end = _span(text, section)
        text = f"{text[:begin]}\n{render([cells(name, row_of(name)) for name in names])}\n{text[end:]}"
    page.write_text(text, "utf-8")


def stable(row: dict[str, str]) -> dict[str, str]:
    """What must be the same on every machine: floats are left out, in the remarks too."""
    masked = re.sub(r"\d+e[+-]\d+", "...", row["remarks"])
    return {key: value for key, value in row.items() if key not in FLOATS} | {"remarks": masked}


if __name__ == "__main__":
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if sys.argv[1:]:
        print(render([cells(name, row_of(name)) for name in sys.argv[1:]]))
    else:
        write()

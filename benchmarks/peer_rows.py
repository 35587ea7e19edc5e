"""What `peers.py` measures, and the table it prints."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from common import console
from peer_environments import OURS


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to quantize: which peer, with which options of its worker."""

    title: str
    peer: str
    options: dict[str, Any]
    slow: bool = False
    note: str = ""


_ASYMMETRIC = "with zero points, as all rows but the one that says otherwise; all else by default"
ROWS = {
    "rtn": Row("plain rounding", OURS, {"preset": "fast", "method": "rtn"}),
    "fast": Row("OpenAWQ fast", OURS, {"preset": "fast"}),
    "balanced": Row("OpenAWQ balanced", OURS, {"preset": "balanced"}),
    "best": Row("OpenAWQ best", OURS, {"preset": "best"}),
    "autoawq": Row(
        "AutoAWQ",
        "autoawq",
        {"copies": True},
        note="`Tensor.cpu` is patched to copy, as it does for a tensor on a GPU",
    ),
    "autoawq-unpatched": Row(
        "AutoAWQ on a processor, as it is",
        "autoawq",
        {"copies": False},
        note="weights that it means to restore have changed",
    ),
    "llmcompressor-awq": Row(
        "llm-compressor AWQ",
        "llmcompressor",
        {"method": "awq"},
        note="`IntermediatesCache.pin_memory` is left out: it needs a GPU",
    ),
    "llmcompressor-gptq": Row("llm-compressor GPTQ", "llmcompressor", {"method": "gptq"}),
    "gptqmodel-awq": Row(
        "GPTQModel AWQ",
        "gptqmodel",
        {"method": "awq"},
        note="in float16, as it refuses to pack from float32; `GPTQMODEL_CPU_WORKERS=2`, without which it "
        "crashes on two cores",
    ),
    "gptqmodel-gptq": Row(
        "GPTQModel GPTQ", "gptqmodel", {"method": "gptq"}, note="`GPTQMODEL_CPU_WORKERS=2`, as above"
    ),
    "autoround": Row("AutoRound", "autoround", {"sym": False}, note=_ASYMMETRIC),
    "autoround-symmetric": Row("AutoRound, symmetric", "autoround", {"sym": True}, note="its default scheme"),
    "autoround-best": Row(
        "AutoRound, 1000 steps",
        "autoround",
        {"sym": False, "iters": 1000},
        slow=True,
        note="its best recipe, on these samples",
    ),
    "mlx-gptq": Row(
        "mlx-lm GPTQ",
        "mlx",
        {"method": "gptq"},
        note="the embeddings, which it quantizes too, are left alone",
    ),
    "mlx-awq": Row("mlx-lm AWQ", "mlx", {"method": "awq"}, slow=True, note="embeddings left alone"),
    "mlx-dwq": Row(
        "mlx-lm DWQ",
        "mlx",
        {"method": "dwq"},
        slow=True,
        note="embeddings left alone; one pass over the samples",
    ),
}


def brief(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if row["error"]:
        return str(row["error"])
    return f"KL {row['divergence']['kl']:.6f}, {row['quantizing']:.1f} s"


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """The table, and what was done to make the peers run."""
    table = Table(title=title)
    columns = ("method", "KL ± standard error", "/ AutoAWQ", "same first token", "perplexity")
    columns += ("s quantizing (processor)", "s whole", "times balanced", "peak MB", "bits")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    theirs = rows.get("autoawq", {}).get("divergence", {}).get("kl")
    known = [name for name in ROWS if name in rows]
    for name in known:
        table.add_row(ROWS[name].title, *cells(rows[name], theirs))
    console.print(table)
    for name in known:
        row = rows[name]
        if row["error"]:
            console.print(f"{ROWS[name].title}: {row['error']}")
        elif ROWS[name].note:
            console.print(f"{ROWS[name].title}: {ROWS[name].note}.")


def cells(row: dict[str, Any], theirs: float | None) -> list[str]:
    """What stands behind a row's name."""
    if row["error"]:
        return ["failed"]
    got = row["divergence"]
    return [
        f"{got['kl']:.5f} ± {got['kl_stderr']:.5f}",
        f"{got['kl'] / theirs:.2f}" if theirs else "",
        f"{got['top1']:.1%}",
        f"{got['perplexity']['value']:.3f}",
        f"{row['quantizing']:.1f} ({row['processor']:.1f})",
        f"{row['whole']:.1f}",
        f"{row['whole'] / row['beside']:.1f}" if row["beside"] else "",
        f"{row['peak'] / 1e6:.0f}",
        f"{row['bits']:.2f}",
    ]

"""Peak memory of `awq quantize` beside the depth of the model: it must not grow with it.

Random Llama checkpoints of one width and several depths are quantized, each in a process of its own. What
counts is the resident set at its peak, less what the imports alone had needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import LlamaConfig

from common import console, finish
from random_llama import write_random_llama

# Runs the real command line after everything is imported, and tells the peak before and after.
_RUN = """
import json, resource, sys
import torch, transformers, awq.pipeline, awq.cli.main, accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
imports = peak()
sys.argv[:] = ["awq", *sys.argv[1:]]
awq.cli.main.app(standalone_mode=False)
print(json.dumps({"imports": imports, "peak": peak()}))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--wide", type=int, default=2816)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = [measure(depth, options) for depth in options.depths]
    table = Table(title=f"awq quantize, random Llama of width {options.hidden}")
    for column in ("blocks", "weights on disk", "above the imports", "predicted", "in blocks"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["blocks"]),
            f"{row['checkpoint'] / 1e6:.0f} MB",
            f"{row['above'] / 1e6:.0f} MB",
            f"{row['predicted'] / 1e6:.0f} MB",
            f"{row['above'] / row['block']:.1f}",
        )
    console.print(table)
    difference = (rows[-1]["above"] - rows[0]["above"]) / rows[0]["block"]
    console.print(
        f"From {rows[0]['blocks']} to {rows[-1]['blocks']} blocks the peak moves by {difference:+.2f} blocks "
        f"(one block: {rows[0]['block'] / 1e6:.0f} MB as float32)."
    )
    finish(options, {"rows": rows})


def measure(depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize a model of this many blocks in a process of its own."""
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.wide,
        num_hidden_layers=depth,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        model, report, ids = (Path(folder) / name for name in ("model", "report.json", "ids.json"))
        weights = write_random_llama(model, config)
        rows = [[(i * 31 + j * 7) % 4096 for j in range(options.seq_len)] for i in range(options.samples)]
        ids.write_text(json.dumps(rows))
        words = ["quantize", str(model), str(Path(folder) / "out"), "--calib", str(ids)]
        words += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
        command = [sys.executable, "-c", _RUN, *words, "--device", "cpu", "--report", str(report)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            sys.exit(f"awq quantize failed: {ran.stderr[-2000:]}")
        peaks = json.loads(ran.stdout.splitlines()[-1])
        return {
            "blocks": depth,
            "block": 4 * weights,
            "checkpoint": sum(path.stat().st_size for path in model.glob("*.safetensors")),
            "above": peaks["peak"] - peaks["imports"],
            "predicted": json.loads(report.read_text())["plan"]["peak_bytes"],
        }


if __name__ == "__main__":
    main()

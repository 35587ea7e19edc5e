"""GPU kernels: checked against the oracle, timed beside cuBLAS in bfloat16, and used in a whole decode.

    python benchmarks/gpu_kernels.py [--quick] [--sections check,accuracy,layers,decode] [--kernels hopper]

Weights are out of the cache when they are read, and times are those of a replayed CUDA graph. It takes a few
minutes, most of it compiling. Writes `gpu_kernels-CARD.json` and a table, `gpu_kernels-CARD.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awq.kernels import LayerSpec, choose, kernel_names, multiply
from awq.kernels.registry import Kernel, kernel_named
from gpu_accuracy import accuracy
from gpu_check import check, check_merged, check_panels, random_weight
from gpu_decode import decode
from gpu_timing import copies_that_miss_the_cache, device_facts, graph_microseconds

# Output and input channels: merged and single projections of Llamas of 8 and 70 billion weights.
SHAPES = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate or up": (14336, 4096),
    "8B gate and up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B qkv": (10240, 8192),
    "70B o": (8192, 8192),
    "70B gate and up": (57344, 8192),
    "70B down": (8192, 28672),
}
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)


def gpu_kernels() -> list[Kernel]:
    """Kernels that serve GPUs here, but for the oracle, and Humming, which `gpu_humming.py` measures."""
    spec = LayerSpec("cuda", torch.float16, 4096, 4096, 128)
    kernels = [kernel_named(name) for name in kernel_names() if name not in ("torch", "humming")]
    return [kernel for kernel in kernels if kernel.refuses(spec) is None]


def measure(kernel: Kernel, shape: tuple[int, int], all_rows: tuple[int, ...]) -> list[dict[str, float]]:
    """Microseconds of a layer in groups of 128, and of cuBLAS on the same weight in bfloat16."""
    out, columns = shape
    weight = random_weight(out, columns, 128)
    dense = weight.dequantize(torch.bfloat16)
    state = kernel.prepare(weight, torch.bfloat16)
    bytes_read = sum(part.nbytes for part in state if isinstance(part, Tensor))
    states = [state]
    for _ in range(copies_that_miss_the_cache(bytes_read) - 1):
        states.append(type(state)(*(part.clone() if isinstance(part, Tensor) else part for part in state)))
    denses = [dense] + [dense.clone() for _ in range(copies_that_miss_the_cache(dense.nbytes) - 1)]
    found = []
    # The card takes its time to raise its clocks: the first figures are not kept.
    for rows in (all_rows[0], *all_rows):
        inputs = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        times = {
            "us": graph_microseconds([lambda s=s, x=inputs: kernel.forward(x, s) for s in states]),
            "cublas us": graph_microseconds([lambda d=d, x=inputs: F.linear(x, d) for d in denses]),
        }
        read = bytes_read + 2 * rows * (out + columns)
        found.append(
            {
                "rows": rows,
                **times,
                "ratio": times["cublas us"] / times["us"],
                "TB/s": read / times["us"] / 1e6,
            }
        )
    return found[1:]


def overhead(kernel: Kernel) -> dict[str, float]:
    """Microseconds of the host for one product of one row, called directly and through the operator."""
    state = kernel.prepare(random_weight(1024, 1024, 128), torch.bfloat16)
    inputs = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    tensors = [part for part in state if isinstance(part, Tensor)]
    numbers = [part for part in state if not isinstance(part, Tensor)]
    dense = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    calls = {
        "direct": lambda: multiply(inputs, kernel, state, 1024),
        "through the operator": lambda: torch.ops.openawq.multiply(
            inputs, tensors, numbers, kernel.name, 1024
        ),
        "torch.nn.functional.linear": lambda: F.linear(inputs, dense),
    }
    found = {}
    for name, call in calls.items():
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(200):
            call()
        found[name] = (time.perf_counter() - started) / 200 * 1e6
        torch.cuda.synchronize()
    return found


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    device = figures["device"]
    lines = [f"# GPU kernels on {device['card']}", ""]
    lines += [f"- {name}: {value:.2f}" for name, value in device.items() if name != "card"]
    lines += [f"- {name}: {figures['versions'][name]}" for name in figures["versions"]]
    for kernel, found in figures["kernels"].items():
        lines += ["", f"## {kernel}", ""]
        if "check" in found:
            errors = found["check"]["largest relative error"].items()
            told = ", ".join(f"{error:.1e} in {dtype.removeprefix('torch.')}" for dtype, error in errors)
            lines.append(f"- {found['check']['cases']} products checked; largest relative error {told}")
        if "layers" in found:
            overhead = found.get("overhead", {}).items()
            lines += [f"- host, one product {name}: {us:.1f} us" for name, us in overhead]
            lines += _layers(found["layers"], device["read TB/s"])
    for name in ("quantizing", "merged"):
        if name in figures:
            lines += ["", f"## {name.capitalize()}", ""]
            lines += [f"- {fact}: {value:.3g}" for fact, value in figures[name].items()]
    if "accuracy" in figures:
        lines += ["", "## The bundled model, quantized to 4 bits in groups of 128", ""]
        for device, found in figures["accuracy"].items():
            told = f"KL divergence {found['KL']:.6f}, standard error {found['standard error']:.6f}"
            lines.append(f"- on {device}: {told}, {found['seconds']:.1f} s")
    if "decode" in figures:
        lines += _decode(figures["decode"])
    return "\n".join(lines).rstrip() + "\n"


def _decode(found: dict[str, Any]) -> list[str]:
    lines = ["", f"## Decode: batch 1, {found['blocks']} blocks", ""]
    lines += ["| model | tokens/s | ms a token |", "|---|---|---|"]
    for way, speed in found["tokens/s"].items():
        lines.append(f"| {way} | {speed:.1f} | {1000 / speed:.2f} |")
    lines += ["", *(f"- {note}: {value:.3g}" for note, value in found["notes"].items())]
    for way, rows in found.get("profiles", {}).items():
        busy, launches = sum(row["us"] for row in rows), sum(row["launches"] for row in rows)
        lines += [
            "",
            f"### {way}",
            "",
            f"{launches:.0f} launches, {busy:.0f} us of them a token, waiting for the launch ahead included "
            "where one begins early; most of it:",
            "",
        ]
        lines += ["| launched | us | launches |", "|---|---|---|"]
        lines += [f"| `{row['name'][:80]}` | {row['us']:.0f} | {row['launches']:.0f} |" for row in rows[:10]]
    return lines


def _layers(layers: dict[str, list[dict[str, float]]], fastest: float) -> list[str]:
    rows = [int(entry["rows"]) for entry in next(iter(layers.values()))]
    told = "times cuBLAS in bfloat16; up to 8 rows the share of the speed of a large read"
    lines = ["", f"Microseconds ({told}).", ""]
    lines += ["| layer | " + " | ".join(f"M={n}" for n in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name, entries in layers.items():
        cells = []
        for entry in entries:
            share = f", {entry['TB/s'] / fastest:.0%}" if entry["rows"] <= 8 else ""
            cells.append(f"{entry['us']:.1f} ({entry['ratio']:.2f}x{share})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rows")
    parser.add_argument("--blocks", type=int, default=32, help="of the decoded model")
    parser.add_argument("--four-bits-only", action="store_true", help="do not decode in bfloat16 beside it")
    parser.add_argument(
        "--sections",
        default="check,accuracy,layers,decode",
        help="of these; those left out stay as they are in the files",
    )
    parser.add_argument("--kernels", help="of these only; those left out stay as they are in the files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    import triton

    sections = options.sections.split(",")
    device = device_facts()
    print(device, flush=True)
    file = options.out / f"gpu_kernels-{str(device['card']).replace(' ', '-')}.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"kernels": {}}
    figures |= {"device": device, "versions": {"torch": torch.__version__, "triton": triton.__version__}}
    asked = options.kernels.split(",") if options.kernels else kernel_names()
    for kernel in gpu_kernels():
        if kernel.name not in asked:
            continue
        print(choose(LayerSpec("cuda", torch.bfloat16, 4096, 4096, 128)).reason, flush=True)
        found = figures["kernels"].setdefault(kernel.name, {})
        if "check" in sections:
            found["check"] = check(kernel)
        if "layers" in sections:
            found["overhead"] = overhead(kernel)
            shapes = itertools.islice(SHAPES.items(), 5 if options.quick else None)
            rows = (1, 8, 16, 64, 128, 4096) if options.quick else ROWS
            found["layers"] = {}
            for name, shape in shapes:
                found["layers"][name] = measure(kernel, shape, rows)
                torch.cuda.empty_cache()
    if "check" in sections:
        figures["quantizing"] = check_panels()
        figures["merged"] = check_merged()
    if "accuracy" in sections:
        figures["accuracy"] = accuracy()
    if "decode" in sections:
        figures["decode"] = decode(options.blocks, not options.four_bits_only)
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(figures))
    print(table(figures))


if __name__ == "__main__":
    main()

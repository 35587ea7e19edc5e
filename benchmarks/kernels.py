"""Each kernel beside the dense product, on one layer, for 1 to 1024 rows of activations.

All candidates take turns within each round, so that a machine that speeds up or slows down does so for all of
them. Each has copies of its weight that together are larger than the caches, and uses another one each time:
as in a model, the weight comes from memory. With one thread, time is the processor's: what other programs
take away does not count (but for the copying, which is therefore too slow on a busy machine).

The roofline is the speed at which either the memory or the arithmetic is the limit: the smallest of the
weights and the activations at the speed of copying large tensors here (on a processor, reading alone can be
faster), and the products at the speed of the fastest dense product found here: of floats, or, on a processor,
of bytes, of which an activation is as many as `cpu-w4a16` takes (with one, `cpu-w4a8` can be above the line).

    python benchmarks/kernels.py --json kernels.json --picture kernels.svg
    AWQ_CPU_ISA=avx2 python benchmarks/kernels.py --rows 1 16 256
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from awq.evaluate import copy_bandwidth
from awq.kernels import LayerSpec, kernel_names
from awq.kernels.registry import kernel_named
from awq.weight import QuantizedWeight
from common import console, finish

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass
class Candidate:
    """A way to multiply with one of several equal weights."""

    name: str
    bytes: int
    run: Callable[[Tensor], Tensor]


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layer", default="4096x4096", help="OUTxIN")
    parser.add_argument("--group", type=int, default=128, help="-1 for one group per row")
    parser.add_argument("--bits", type=int, default=4, help="of a code, up to 8")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--kernels", nargs="+", help="only these; all that serve the layer by default")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each number of rows, about")
    parser.add_argument("--rounds", type=int, default=100, help="at most, for each number of rows")
    parser.add_argument("--cold", type=int, default=320, help="MB that the copies of a weight fill at least")
    parser.add_argument("--picture", type=Path, help="draw rows per second; PNG or SVG (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    bandwidth = copy_bandwidth(options.device)
    peak = peak_speed(options)
    console.print(
        f"{_device(options.device)}; copying reaches {bandwidth / 1e9:.1f} GB/s, "
        f"dense products {peak / 1e12:.2f} TFLOP/s"
    )
    found, refused = candidates(options)
    for name, reason in refused.items():
        console.print(f"not measured: {name}: {reason}")
    figures = measure(found, options)
    smallest = min(candidate.bytes for candidate in found)
    roofline = {rows: roof_seconds(rows, smallest, bandwidth, peak, options) for rows in options.rows}
    for row in figures:
        row["of_copy"] = row["bytes"] / (row["median_ms"] * 1e-3) / bandwidth
        row["of_roofline"] = roofline[row["rows"]] / (row["median_ms"] * 1e-3)
    print_table(figures, options)
    if options.picture:
        draw(figures, roofline, options)
    everything = {
        "options": vars(options),
        "device": _device(options.device),
        "copy": bandwidth,
        "peak": peak,
    }
    everything = json.loads(json.dumps(everything, default=str))
    finish(options, everything | {"refused": refused, "figures": figures})


def candidates(options: argparse.Namespace) -> tuple[list[Candidate], dict[str, str]]:
    """What serves the layer, and why the rest does not."""
    out, columns = (int(word) for word in options.layer.split("x"))
    group = columns if options.group == -1 else options.group
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (out, columns // group)
    weight = QuantizedWeight(
        torch.randint(0, 1 << options.bits, (out, columns), generator=generator, dtype=torch.uint8),
        (torch.rand(shape, generator=generator) * 0.02 + 0.001).to(torch.float16),
        torch.randint(0, 1 << options.bits, shape, generator=generator, dtype=torch.uint8),
        options.bits,
    )
    spec = LayerSpec(torch.device(options.device).type, dtype, columns, out, group, options.bits)
    found, refused = [], {}
    for name in options.kernels or kernel_names():
        if name == "dense":
            continue
        kernel = kernel_named(name)
        reason = kernel.refuses(spec)
        if reason:
            refused[name] = reason
            continue

        def prepared(kernel: Any = kernel) -> Any:
            parts = (part.clone() for part in (weight.codes, weight.scales, weight.zeros))
            return kernel.prepare(QuantizedWeight(*parts, options.bits).to(options.device), dtype)

        found.append(_rotating(name, kernel.forward, prepared, options))
    values = weight.dequantize()
    kinds = [torch.bfloat16, torch.float32] if spec.device == "cpu" else [dtype]
    for kind in kinds:

        def dense(kind: torch.dtype = kind) -> tuple[Tensor]:
            return (values.to(options.device, kind, copy=True),)

        found.append(_rotating(f"dense {str(kind).removeprefix('torch.')}", _dense, dense, options))
    return found, refused


def peak_speed(options: argparse.Namespace, size: int = 2048, repeats: int = 5) -> float:
    """Operations per second of the fastest dense product of a size that caches hold, counted as of floats."""
    dtype, device = getattr(torch, options.dtype), options.device
    on_processor = torch.device(device).type == "cpu"
    clock = _cpu_seconds if on_processor else _gpu_seconds
    found = []
    for kind in {dtype, torch.float32} if on_processor else {dtype}:
        values = torch.randn(size, size, device=device).to(kind)
        seconds = [clock(lambda inputs: F.linear(inputs, inputs), values) for _ in range(repeats)]
        found.append(2 * size**3 / min(seconds))
    if on_processor:
        digits = kernel_named("cpu-w4a16").digits(dtype)  # type: ignore[attr-defined]
        codes = torch.randint(-128, 128, (size, size), dtype=torch.int8)
        seconds = [clock(lambda inputs: torch._int_mm(inputs, inputs), codes) for _ in range(repeats)]
        found.append(2 * size**3 / min(seconds) / digits)
    return max(found)


def roof_seconds(rows: int, weight: int, bandwidth: float, peak: float, options: argparse.Namespace) -> float:
    """Seconds that memory and arithmetic take at the least, for a weight of so many bytes."""
    out, columns = (int(word) for word in options.layer.split("x"))
    activations = rows * (out + columns) * getattr(torch, options.dtype).itemsize
    return max((weight + activations) / bandwidth, 2 * rows * out * columns / peak)


def _dense(inputs: Tensor, state: tuple[Tensor]) -> Tensor:
    return F.linear(inputs.to(state[0].dtype), state[0])


def _rotating(name: str, forward: Any, make: Any, options: argparse.Namespace) -> Candidate:
    """A candidate that uses another copy of its weight each time."""
    state = make()
    tensors = [part for part in state if isinstance(part, Tensor)]
    size = sum(part.numel() * part.element_size() for part in tensors)
    copies = [state]
    while len(copies) * size < options.cold << 20:
        copies.append(make())
    turn = [0]

    def run(inputs: Tensor) -> Tensor:
        turn[0] = (turn[0] + 1) % len(copies)
        return forward(inputs, copies[turn[0]])

    return Candidate(name, size, run)


@torch.no_grad()
def measure(found: list[Candidate], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Median and quartiles of each candidate for each number of rows."""
    _, columns = (int(word) for word in options.layer.split("x"))
    clock = _gpu_seconds if torch.device(options.device).type == "cuda" else _cpu_seconds
    figures = []
    for rows in options.rows:
        inputs = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        inputs = inputs.to(options.device, getattr(torch, options.dtype))
        for candidate in found:
            candidate.run(inputs)
        seconds: dict[str, list[float]] = {candidate.name: [] for candidate in found}
        started = time.perf_counter()
        for turn in range(options.rounds):
            if turn >= 3 and time.perf_counter() - started > options.seconds:
                break
            for candidate in found:
                seconds[candidate.name].append(clock(candidate.run, inputs))
        base = seconds[found[-1].name if len(found) == 1 else _baseline(found)]
        for candidate in found:
            times = seconds[candidate.name]
            low, middle, high = _quartiles(times)
            figures.append(
                {
                    "rows": rows,
                    "kernel": candidate.name,
                    "bytes": candidate.bytes,
                    "median_ms": middle * 1e3,
                    "quartiles_ms": [low * 1e3, high * 1e3],
                    "fastest_ms": min(times) * 1e3,
                    "rounds": len(times),
                    # Round by round: what slows both does not count.
                    "times_dense": statistics.median(b / t for b, t in zip(base, times, strict=True)),
                }
            )
    return figures


def _baseline(found: list[Candidate]) -> str:
    return next(candidate.name for candidate in found if candidate.name.startswith("dense"))


def _quartiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) < 2:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def _cpu_seconds(run: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    run(inputs)
    return clock() - started


def _gpu_seconds(run: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run(inputs)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3


def print_table(figures: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A line for each number of rows; in a cell median ms, its quartiles, and how often as fast as dense."""
    names = list(dict.fromkeys(row["kernel"] for row in figures))
    table = Table(
        title=f"{options.layer}, groups of {options.group}, {options.dtype} activations: "
        "median ms, quartiles, times as fast as the first dense, share of the roofline's speed"
    )
    table.add_column("rows", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for rows in options.rows:
        cells = []
        for row in (row for row in figures if row["rows"] == rows):
            low, high = row["quartiles_ms"]
            cells.append(
                f"{row['median_ms']:.3g}\n{low:.3g}-{high:.3g}\n"
                f"{row['times_dense']:.2f}x {row['of_roofline']:.0%}"
            )
        table.add_row(str(rows), *cells)
    console.print(table)


def draw(figures: list[dict[str, Any]], roofline: dict[int, float], options: argparse.Namespace) -> None:
    """Rows (tokens) per second against rows, both logarithmic, below the roofline."""
    try:
        import matplotlib
    except ImportError:
        console.print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(row["kernel"] for row in figures):
        points = [
            (row["rows"], row["rows"] / row["median_ms"] * 1e3) for row in figures if row["kernel"] == name
        ]
        style = "--" if name.startswith("dense") else "-"
        axes.loglog(*zip(*points, strict=True), style, marker="o", markersize=4, base=2, label=name)
    speeds = [rows / seconds for rows, seconds in roofline.items()]
    axes.loglog(list(roofline), speeds, ":", color="black", base=2, label="roofline")
    axes.set_yscale("log")
    axes.set_xlabel("rows of activations (tokens at once)")
    axes.set_ylabel("tokens per second through this layer")
    axes.set_title(f"{options.layer}, groups of {options.group}, {options.dtype}, {_device(options.device)}")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(options.picture, dpi=150)
    console.print(f"wrote {options.picture}")


def _device(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()

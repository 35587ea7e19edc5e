"""Humming's product checked against the oracle, and timed beside our Triton kernel and cuBLAS in bfloat16.

    pip install 'humming-kernels[cu13]'      # or [cu12]
    python benchmarks/gpu_humming.py [--sections check,model,layers]

Programs are compiled as they come, several at once. Writes `gpu_humming-CARD.json` and a table,
`gpu_humming-CARD.md`. A section that fails is told and the others go on; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

from awq import QuantConfig, load_quantized
from awq.kernels import LayerSpec
from awq.kernels.humming import Humming, program_for
from awq.kernels.triton_int4 import TritonInt4
from awq.pipeline import quantize
from gpu_check import TOLERANCES as OURS
from gpu_check import check_graph, random_weight
from gpu_kernels import SHAPES, measure
from gpu_timing import device_facts

ROWS = (1, 16, 64, 128, 256, 1024)
LAYERS = ("8B qkv", "8B o", "8B gate or up", "8B gate and up", "8B down")
# Output and input channels, groups (0 is the whole row) and rows that are checked.
CHECKED = (
    ((128, 1024), (32, 64, 128, 0), (1, 17, 300)),
    ((384, 320), (64, 0), (3, 64)),
    ((4096, 4096), (128,), (1, 8, 16, 64, 128, 300, 1500)),
)
# Our products round once, the result. Humming rounds scales and weights to the dtype of the activations as
# well, or the sums that programs share: errors of a size, which do not know of one another.
TOLERANCES = {dtype: math.sqrt(3) * OURS[dtype] for dtype in (torch.float16, torch.bfloat16)}


def compile_all(cases: list[tuple[int, int, int, int, torch.dtype]]) -> float:
    """Seconds to compile the programs of (rows, outputs, inputs, group size, dtype), all at once."""
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda case: program_for(*case, device=0), cases))
    return time.perf_counter() - started


def check() -> dict[str, Any]:
    """Largest relative error to the float64 product, by dtype, and whether the same bits come twice.

    The very codes, scales and zero points must come back. A replayed graph must agree within the tolerance.
    """
    kernel, worst, same, cases = Humming(), {str(dtype): 0.0 for dtype in TOLERANCES}, True, []
    for ((out, columns), groups, all_rows), dtype in itertools.product(CHECKED, TOLERANCES):
        for group, rows in itertools.product(groups, (*all_rows, min(1024, columns))):  # the last: codes
            cases.append((rows, out, columns, group or columns, dtype))
    seconds = compile_all(cases)
    for ((out, columns), groups, all_rows), dtype in itertools.product(CHECKED, TOLERANCES):
        for group in groups:
            weight = random_weight(out, columns, group or columns)
            state = kernel.prepare(weight, dtype)
            name = f"{out}x{columns}, groups of {group or columns}, {dtype}"
            assert torch.equal(kernel.codes(state), weight.codes), f"codes differ: {name}"
            assert torch.equal(state.scales, weight.scales), f"scales differ: {name}"
            exact = weight.dequantize().double().t()
            for rows in all_rows:
                inputs = torch.randn(rows, columns, device="cuda").to(dtype)
                expected = inputs.double() @ exact
                got = kernel.forward(inputs, state)
                error = float((got.double() - expected).norm() / expected.norm())
                assert error < TOLERANCES[dtype], f"{name}, {rows} rows: {error:.2e}"
                worst[str(dtype)] = max(worst[str(dtype)], error)
                same = same and torch.equal(got, kernel.forward(inputs, state))
    return {
        "largest relative error": worst,
        "same bits twice": same,
        "largest relative difference of a replayed graph": check_graph(kernel, TOLERANCES[torch.bfloat16]),
        "programs compiled": len(cases),
        "seconds to compile": seconds,
    }


def model() -> dict[str, Any]:
    """The bundled model, rounded plainly and loaded with `kernel="marlin"`, against plain PyTorch."""
    folder = Path(str(resources.files("awq").joinpath("data/books6m")))
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "out"
        quantize(folder, out, QuantConfig(method="rtn"), samples=1, seq_len=64, verify=False)
        options = {"device_map": "cuda:0", "dtype": torch.bfloat16}
        ours, plain = (load_quantized(out, kernel=name, **options) for name in ("marlin", "torch"))
        ids = torch.arange(3, 40, device="cuda")[None]
        with torch.no_grad():
            want, got = plain(ids).logits.float(), ours(ids).logits.float()
        served: dict[str, int] = {}
        for module in ours.modules():
            choice = getattr(module, "_choice", None)
            if choice is not None:
                served[choice.kernel.name] = served.get(choice.kernel.name, 0) + 1
        difference = float((got - want).norm() / want.norm())
        assert difference < 0.03, f"logits differ by {difference:.2e}"
        tokens = ours.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    return {"layers by kernel": served, "relative difference of logits": difference, "tokens": tokens}


def layers() -> dict[str, Any]:
    """Microseconds of both kernels on the layers of an 8B Llama, in groups of 128 and bfloat16."""
    shapes = {name: SHAPES[name] for name in LAYERS}
    seconds = compile_all([(rows, *shape, 128, torch.bfloat16) for shape in shapes.values() for rows in ROWS])
    found: dict[str, Any] = {"seconds to compile": seconds, "humming": {}, "triton": {}}
    for name, shape in shapes.items():
        for kernel in (Humming(), TritonInt4()):
            found[kernel.name][name] = measure(kernel, shape, ROWS)
            torch.cuda.empty_cache()
    return found


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [f"# Humming on {figures['device']['card']}", ""]
    lines += [f"- {name}: {value}" for name, value in figures["versions"].items()]
    for section in ("check", "model"):
        lines += [f"- {section}: {name}: {value}" for name, value in figures.get(section, {}).items()]
    if "layers" in figures:
        lines += ["", "Microseconds: Humming / Triton / cuBLAS.", ""]
        lines += ["| layer | " + " | ".join(f"M={rows}" for rows in ROWS) + " |"]
        lines += ["|---" * (len(ROWS) + 1) + "|"]
        for name, entries in figures["layers"]["humming"].items():
            beside = figures["layers"]["triton"][name]
            cells = [
                f"{one['us']:.1f} / {two['us']:.1f} / {two['cublas us']:.1f}"
                for one, two in zip(entries, beside, strict=True)
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", default="check,model,layers")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    reason = Humming().refuses(LayerSpec("cuda", torch.bfloat16, 4096, 4096, 128))
    if reason:
        sys.exit(f"Humming does not serve here: {reason}")
    figures: dict[str, Any] = {
        "device": device_facts(),
        "versions": {"torch": torch.__version__, "humming-kernels": metadata.version("humming-kernels")},
    }
    failed = []
    for section in options.sections.split(","):
        try:
            figures[section] = {"check": check, "model": model, "layers": layers}[section]()
        except Exception:  # whatever a foreign package raises: the rest is measured all the same
            failed.append(section)
            traceback.print_exc()
        print(section, figures.get(section, "FAILED"), flush=True)
    card = str(figures["device"]["card"]).replace(" ", "-")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"gpu_humming-{card}.json"
    if file.exists():  # sections left out stay as they were
        figures = json.loads(file.read_text()) | figures
    file.write_text(json.dumps(figures, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(figures))
    print(table(figures))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()

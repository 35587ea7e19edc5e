"""What GPU kernels give, checked against the oracle and against plain PyTorch: products, merges, panels."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from awq.kernels import LayerSpec, multiply
from awq.kernels.registry import Kernel
from awq.kernels.triton_panel import mover_for, panel_for
from awq.nn import Merge, QuantLinear
from awq.search import rounding
from awq.search.gram import InputStats, output_error
from awq.search.refine import refine
from awq.weight import QuantizedWeight

TOLERANCES = {torch.float16: 6e-4, torch.bfloat16: 4e-3, torch.float32: 1e-5}


def random_weight(out: int, columns: int, group: int, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (out, columns // group)
    return QuantizedWeight(
        torch.randint(0, 16, (out, columns), generator=generator, dtype=torch.uint8, device="cuda"),
        (torch.rand(shape, generator=generator, device="cuda") * 0.02 + 0.001).half(),
        torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8, device="cuda"),
    )


def check(kernel: Kernel) -> dict[str, Any]:
    """Largest relative error to the float64 product, over groups, dtypes, shapes and rows.

    Also: the very codes come back, the same bits twice, and the same bits from a replayed graph.
    """
    worst: dict[str, float] = {}
    cases = 0
    shapes = ((128, 1024), (200, 2048), (1032, 4096), (1040, 14336), (4096, 1536))
    groups = (32, 64, 128, 192, 0)
    for (out, columns), group, dtype in itertools.product(shapes, groups, TOLERANCES):
        size = group or columns
        if columns % size:
            continue
        if kernel.refuses(LayerSpec("cuda", dtype, columns, out, size)):
            continue
        weight = random_weight(out, columns, size)
        state = kernel.prepare(weight, dtype)
        assert torch.equal(kernel.codes(state), weight.codes)
        exact_weight = weight.dequantize().double().t()
        for rows in (1, 3, 8, 9, 16, 17, 64, 65, 128, 383, 384) if group == 128 else (1, 16, 65):
            inputs = torch.randn(rows, columns, device="cuda").to(dtype)
            expected = inputs.double() @ exact_weight
            got = kernel.forward(inputs, state)
            error = float((got.double() - expected).norm() / expected.norm())
            case = f"{kernel.name}: {rows} rows, {out}x{columns}, groups of {size}, {dtype}: {error:.2e}"
            assert error < TOLERANCES[dtype], case
            assert torch.equal(got, kernel.forward(inputs, state)), f"not deterministic: {case}"
            worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error)
            cases += 1
    check_graph(kernel)
    cases += check_magnitudes(kernel)
    return {"cases": cases, "largest relative error": worst}


def check_magnitudes(kernel: Kernel) -> int:
    """Very small and very large bfloat16 activations, and such far from zero in the mean: how many cases."""
    weight = random_weight(1040, 4096, 128)
    state, exact_weight = kernel.prepare(weight, torch.bfloat16), weight.dequantize().double().t()
    cases = list(itertools.product((1, 8, 16, 65), (2.0**-50, 1.0, 2.0**55), (0, 30)))
    for rows, factor, mean in cases:
        inputs = ((torch.randn(rows, 4096, device="cuda") + mean) * factor).bfloat16()
        expected = inputs.double() @ exact_weight
        error = float((kernel.forward(inputs, state).double() - expected).norm() / expected.norm())
        case = f"{kernel.name}: {rows} rows, activations of {mean} +- 1 times {factor:.1e}: {error:.2e}"
        assert error < TOLERANCES[torch.bfloat16], case
    return len(cases)


def check_graph(kernel: Kernel, tolerance: float = 0.0) -> float:
    """The largest relative difference between a replayed graph's bfloat16 product and one outside of it.

    Args:
        tolerance: what it may be; by default the very bits must come.
    """
    weight, worst = random_weight(4096, 4096, 128), 0.0
    state = kernel.prepare(weight, torch.bfloat16)
    for rows in (1, 16, 64, 600):
        inputs = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        multiply(inputs, kernel, state, 4096)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = multiply(inputs, kernel, state, 4096)
        for _ in range(3):
            inputs.copy_(torch.randn_like(inputs))
            graph.replay()
            plain = kernel.forward(inputs, state).double()
            difference = float((out.double() - plain).norm() / plain.norm())
            assert difference <= tolerance, f"a replayed graph is {difference:.1e} off: {rows} rows"
            worst = max(worst, difference)
    return worst


@torch.no_grad()
def check_merged() -> dict[str, float]:
    """Largest relative error of merged layers to the float64 product, for what is read together in Llamas."""
    worst = 0.0
    for sizes, group in itertools.product(((4096, 1024, 1024), (1400, 1400)), (32, 128)):
        weights = [random_weight(out, 4096, group, seed) for seed, out in enumerate(sizes)]
        layers = [QuantLinear.from_weight(weight) for weight in weights]
        for layer in layers:
            layer.prepare(torch.bfloat16)
        merge = Merge(layers)
        for rows in (1, 7, 33, 500):
            inputs = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
            for layer, weight in zip(layers, weights, strict=True):
                expected = inputs.double() @ weight.dequantize().double().t()
                error = float((layer(inputs).double() - expected).norm() / expected.norm())
                assert error < TOLERANCES[torch.bfloat16], f"merged: {rows} rows, {sizes}: {error:.2e}"
                worst = max(worst, error)
        merge.undo()
        for layer, weight in zip(layers, weights, strict=True):
            assert torch.equal(layer.weight_canonical().codes, weight.codes)
    return {"largest relative error of merged layers in bfloat16": worst}


@torch.no_grad()
def check_panels() -> dict[str, float]:
    """Rounding and refining by our programs beside plain PyTorch, on a layer of 4096 x 4096.

    Where a value lies half-way between two codes, the last bit of a sum decides, and all that follows in its
    row may differ: so what must agree is the error that is minimised, and most of the codes.
    """
    device = torch.device("cuda")
    panel, mover = panel_for(device), mover_for(device)
    assert panel is not None
    assert mover is not None
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(4096, 4096, generator=generator, device=device) / 64
    inputs = torch.randn(8192, 4096, generator=generator, device=device)
    inputs *= torch.rand(4096, generator=generator, device=device) + 0.1
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    stats = InputStats((inputs.t() @ inputs / len(inputs))[None], inputs.abs().mean(0), len(inputs))
    low, high = rounding.full_range(weight, 128)
    ways: dict[str, Callable[[], rounding.Codes]] = {
        "GPTQ, our program": lambda: rounding.gptq(weight, stats, low, high, 4, torch.float16, panel),
        "GPTQ, plain PyTorch": lambda: rounding.gptq(weight, stats, low, high, 4, torch.float16),
    }
    found: dict[str, float] = {}
    codes = {name: _timed(name, way, found) for name, way in ways.items()}
    start = codes["GPTQ, plain PyTorch"]
    ways = {
        "refining, our program": lambda: refine(weight, stats, start, 4, 2, mover),
        "refining, plain PyTorch": lambda: refine(weight, stats, start, 4, 2),
    }
    codes |= {name: _timed(name, way, found) for name, way in ways.items()}
    for what in ("GPTQ", "refining"):
        ours, plain = codes[f"{what}, our program"], codes[f"{what}, plain PyTorch"]
        same = float((ours.codes == plain.codes).float().mean())
        errors = [float(output_error(each.values() - weight, stats).sum()) for each in (ours, plain)]
        assert abs(errors[0] / errors[1] - 1) < 1e-3, f"{what}: errors {errors}"
        assert same > 0.9, f"{what}: {same:.2%} of the codes are those of plain PyTorch"
        found[f"{what}: share of equal codes"] = same
        found[f"{what}: error by plain PyTorch's"] = errors[0] / errors[1]
    return found


def _timed(name: str, way: Callable[[], rounding.Codes], found: dict[str, float]) -> rounding.Codes:
    way()
    torch.cuda.synchronize()
    started = time.perf_counter()
    codes = way()
    torch.cuda.synchronize()
    found[f"{name}: seconds"] = time.perf_counter() - started
    return codes

"""`awq doctor`: what this machine will use and why, what it lacks, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from awq.cli.common import console, write_json

# Output and input channels, and the group size, of layers as they occur; the last one is an odd one.
_LAYERS = ((4096, 4096, 128), (14336, 4096, 128), (4096, 14336, 32), (1000, 520, 8))
_DTYPES = ("bfloat16", "float16", "float32")
# Distribution, what it is for, and how it comes.
_PACKAGES = (
    ("torch", "everything", "pip install torch"),
    ("transformers", "loading and running models", "pip install transformers"),
    ("accelerate", "device_map and offloading", "pip install accelerate"),
    ("datasets", "calibration data from the hub", "pip install 'openawq[datasets]'"),
    ("peft", "training adapters on quantized models", "pip install 'openawq[peft]'"),
    ("lm-eval", "awq eval --tasks", "pip install 'openawq[lm-eval]'"),
    ("gguf", "awq export --to gguf", "pip install 'openawq[gguf]'"),
)


def command(
    json: Annotated[str | None, typer.Option(help="Write the findings to this file; - for stdout.")] = None,
) -> None:
    """Say which kernel each kind of layer gets on this machine and why, and what is missing."""
    out = console(json)
    found = findings()
    print_findings(out, found)
    write_json(found, json)


def findings() -> dict[str, Any]:
    """Everything that is told, as plain data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the kernels would warn of is told here in full
        native = _native()
        kernels = _kernels()
    packages = _packages()
    return {
        "machine": _machine(),
        "native": native,
        "kernels": kernels,
        "packages": packages,
        "missing": _missing(native, packages),
    }


def print_findings(out: Console, found: dict[str, Any]) -> None:
    """The findings as tables."""
    machine = Table(title="machine", show_header=False)
    for key, value in found["machine"].items():
        machine.add_row(key.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    native = found["native"]
    told = f"{native['instruction_set']}, in {native['cache']}"
    if native["reason"]:
        told = f"not used: {native['reason']}"
    machine.add_row("C++ products", told)
    out.print(machine)
    kernels = Table(title="kernels")
    for column in ("device", "layer", "dtype", "kernel", "why"):
        kernels.add_column(column)
    for row in found["kernels"]:
        kernels.add_row(*(row[key] for key in ("device", "layer", "dtype", "kernel", "reason")))
    out.print(kernels)
    packages = Table(title="packages")
    for column in ("package", "version", "for"):
        packages.add_column(column)
    for package in found["packages"]:
        packages.add_row(package["name"], package["version"] or "not installed", package["for"])
    out.print(packages)
    if not found["missing"]:
        out.print("Nothing is missing.")
    for item in found["missing"]:
        out.print(f"missing: {item['what']}, for {item['for']}: {item['cure']}")


def _machine() -> dict[str, Any]:
    import torch

    from awq.kernels import native

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "openawq": metadata.version("openawq"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": native.available(),
        "gpus": devices or ["none"],
        "compiler": native.compiler() or "none",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _native() -> dict[str, str | None]:
    """The library of C++ products, compiled now where it has not been yet."""
    from awq.kernels import cpu_native, native

    found = cpu_native.load()
    return {
        "instruction_set": None if isinstance(found, str) else found.instruction_set,
        "cache": str(native.cache_folder()),
        "reason": found if isinstance(found, str) else None,
    }


def _kernels() -> list[dict[str, str]]:
    """The choice for each kind of layer, with layers of the same answer in one row."""
    import torch

    from awq.kernels import LayerSpec, choose

    answers: dict[tuple[str, str, str, str], list[str]] = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for outputs, inputs, group in _LAYERS:
            layer = f"{outputs}x{inputs}, groups of {group}"
            for dtype in _DTYPES:
                choice = choose(LayerSpec(device, getattr(torch, dtype), inputs, outputs, group))
                key = (device, layer, choice.kernel.name, _why(choice.reason))
                answers.setdefault(key, []).append(dtype)
    return [
        {"device": device, "layer": layer, "dtype": ", ".join(dtypes), "kernel": kernel, "reason": reason}
        for (device, layer, kernel, reason), dtypes in answers.items()
    ]


def _why(reason: str) -> str:
    """A choice's reason without the layer, which stands beside it."""
    _, _, refused = reason.partition(" (")
    return refused.removesuffix(")") if refused else "the fastest of all"


def _worth_telling(lacking: str | None) -> str | None:
    """What programs for Hopper GPUs lack where there is nothing but such GPUs."""
    import torch

    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return lacking if set(capabilities) == {(9, 0)} else None


def _packages() -> list[dict[str, str | None]]:
    found = []
    for name, purpose, cure in _PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        found.append({"name": name, "version": version, "for": purpose, "cure": cure})
    return found


def _missing(native: dict[str, Any], packages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What could be had, and how."""
    import torch

    from awq.kernels import hopper, humming, triton_int4
    from awq.kernels import native as library

    missing = []
    if native["reason"] and library.available():
        cure = native["reason"]
        if library.compiler() is None:
            cure += ": apt install g++, dnf install gcc-c++, xcode-select --install, or name one in CXX"
        missing.append({"what": "the C++ products", "for": "speed on this CPU", "cure": cure})
    if torch.cuda.is_available():
        for what, purpose, lacking in (
            ("triton", "fast kernels on the GPU", triton_int4.missing()),
            ("hopper", "faster kernels on an H100 or H200", _worth_telling(hopper.missing())),
            ("humming-kernels", 'backend="marlin" on the GPU', humming.missing()),
        ):
            if lacking:
                missing.append({"what": what, "for": purpose, "cure": lacking})
    elif shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
        cure = f"PyTorch {torch.__version__} does not see it: see https://pytorch.org/get-started"
        missing.append({"what": "the GPU", "for": "running on it", "cure": cure})
    missing += [
        {"what": package["name"], "for": package["for"], "cure": package["cure"]}
        for package in packages
        if package["version"] is None
    ]
    return missing

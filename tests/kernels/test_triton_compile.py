"""The GPU programs are compiled for each kind of GPU, for which none is needed, and must fit into it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from awq.kernels.triton_table import Device, Launch, launch_for, planes_per_group

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")

OUT, IN = 14336, 4096


class Gpu(NamedTuple):
    """A target of the compiler, and what the table needs to know of it."""

    name: str
    target: tuple[str, int | str, int]
    device: Device


GPUS = (
    Gpu("A100", ("cuda", 80, 32), Device(80, 108, 163 * 1024)),
    Gpu("RTX 4090", ("cuda", 89, 32), Device(89, 128, 99 * 1024)),
    Gpu("H100", ("cuda", 90, 32), Device(90, 132, 227 * 1024)),
    Gpu("B200", ("cuda", 100, 32), Device(100, 148, 227 * 1024)),
    Gpu("MI300X", ("hip", "gfx942", 64), Device(94, 304, 64 * 1024, hip=True)),
    Gpu("RX 7900", ("hip", "gfx1100", 32), Device(110, 96, 64 * 1024, hip=True)),
)
H100 = GPUS[2]


def compiled(gpu: Gpu, program: str, dtype: torch.dtype, constants: dict[str, Any], launch: Launch) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from awq.kernels import triton_programs

    function = getattr(triton_programs, program)
    floats = "*bf16" if dtype == torch.bfloat16 else "*fp16"
    pointers = {
        "words_ptr": "*i16",
        "pairs_ptr": "*i32",
        "partial_ptr": "*fp32",
        "counters_ptr": "*i32",
        "rest_ptr": "*fp32",
        "upper_ptr": "*fp32",
        "numbers_ptr": "*fp32",
        "slope_ptr": "*fp32",
        "gram_ptr": "*fp32",
        "moves_ptr": "*fp32",
        "scales_ptr": "*fp32",
        "zeros_ptr": "*fp32",
        "codes_ptr": "*u8",
        "x_ptr": floats,
        "out_ptr": floats,
    }
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in function.arg_names
    }
    # What Triton finds out at a launch: addresses and measures divide by 16.
    free = ("rows", "share_chunks", "channels", "levels")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in free
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget(*gpu.target), options=options)


def product(gpu: Gpu, rows: int, dtype: torch.dtype, group: int = 128, out: int = OUT) -> Any:
    plane = 64 if group % 64 == 0 else 32
    launch = launch_for(rows, out, IN, plane, gpu.device)
    assert launch is not None
    constants: dict[str, Any] = {
        "GROUP": group,
        "PLANE": plane,
        "PER_GROUP": planes_per_group(group, plane),
        "WHOLE": True,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BF16": dtype == torch.bfloat16,
        "PTX": not gpu.device.hip,
    }
    if launch.side:
        constants |= {"SIDE": launch.side, "STAGES": launch.stages, "ONE": rows == 1, "EARLY": launch.early}
        return compiled(gpu, "few_rows", dtype, constants, launch)
    return compiled(gpu, "many_rows", dtype, constants | {"SPLIT": max(launch.split, 2)}, launch)


def spilled_bytes(kernel: Any, gpu: Gpu, folder: Path) -> int:
    """Bytes of registers that did not fit, as the assembler tells."""
    if gpu.device.hip:
        counts = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        assert counts
        return 4 * sum(map(int, counts))
    text = kernel.asm["ptx"]
    file = folder / "program.ptx"
    file.write_text(text)
    architecture = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    assert architecture is not None
    from triton.backends.nvidia.compiler import get_ptxas

    command = [get_ptxas(gpu.device.capability).path, "-v", f"--gpu-name={architecture[1]}", str(file)]
    told = subprocess.run([*command, "-o", str(folder / "out")], capture_output=True, text=True, check=True)
    stores = re.search(r"(\d+) bytes spill stores", told.stderr)
    assert stores is not None, told.stderr
    return int(stores[1])


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (16, torch.float16), (128, torch.float16)])
def test_products_fit_the_shared_memory_and_the_registers(
    gpu: Gpu, rows: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    kernel = product(gpu, rows, dtype)
    assert kernel.metadata.shared <= gpu.device.shared
    # A few registers of some two hundred; where the tile is too large, they are hundreds of bytes.
    assert spilled_bytes(kernel, gpu, tmp_path) <= 40


@pytest.mark.parametrize(("rows", "dtype"), [(64, torch.bfloat16), (8, torch.float16)])
def test_narrow_groups_fit_too(rows: int, dtype: torch.dtype, tmp_path: Path) -> None:
    kernel = product(H100, rows, dtype, group=32)
    assert kernel.metadata.shared <= H100.device.shared
    assert spilled_bytes(kernel, H100, tmp_path) == 0


def test_codes_are_read_ahead_and_multiplied_by_the_matrix_units() -> None:
    """What speed rests on: asynchronous copies of 16 bytes, two codes unpacked at once, matrix units."""
    for rows, instruction, unpacked in (
        (1, "mma.sync.aligned.m16n8k16", f"and.b32 .*, {0x000F000F};"),
        (64, "wgmma.mma_async", "0x000F000F, 0x64006400"),
    ):
        text = product(H100, rows, torch.float16).asm["ptx"]
        assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", text)
        assert re.search(unpacked, text)
        assert instruction in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_that_few_rows_read_is_read_ahead(dtype: torch.dtype) -> None:
    """No load but asynchronous ones: scales too, though only sums depend on them."""
    text = product(H100, 8, dtype, out=6144).asm["ptx"]
    assert "cp.async.ca.shared.global" in text
    assert "ld.global" not in text


@pytest.mark.parametrize(("gpu", "early"), [(GPUS[0], False), (H100, True)], ids=lambda each: str(each)[:12])
def test_single_rows_are_launched_early_where_the_device_can_and_wait(gpu: Gpu, early: bool) -> None:
    """The wait comes before the first read of anything."""
    text = product(gpu, 1, torch.bfloat16, out=4096).asm["ptx"]
    assert ("griddepcontrol.launch_dependents" in text) == early
    if early:
        assert text.index("griddepcontrol.wait") < text.index("cp.async")


@pytest.mark.parametrize("gpu", [H100, GPUS[4]], ids=lambda gpu: gpu.name)
def test_dequantizing_compiles(gpu: Gpu, tmp_path: Path) -> None:
    constants = {"GROUP": 128, "PLANE": 64, "WHOLE": True, "BLOCK_N": 32, "PTX": not gpu.device.hip}
    kernel = compiled(gpu, "dequantize", torch.bfloat16, constants, Launch(0, 32, 4, 3))
    assert spilled_bytes(kernel, gpu, tmp_path) == 0


@pytest.mark.parametrize("gpu", [H100, GPUS[4]], ids=lambda gpu: gpu.name)
def test_rounding_a_panel_compiles(gpu: Gpu, tmp_path: Path) -> None:
    constants = {"WIDEST": 128, "BLOCK": 32}
    kernel = compiled(gpu, "round_panel", torch.float32, constants, Launch(0, 32, 1, 3))
    assert spilled_bytes(kernel, gpu, tmp_path) == 0


@pytest.mark.parametrize("gpu", [H100, GPUS[4]], ids=lambda gpu: gpu.name)
def test_moving_the_codes_of_a_panel_compiles(gpu: Gpu, tmp_path: Path) -> None:
    constants = {"TINY": 2.0**-126, "WIDEST": 128, "BLOCK": 32}
    kernel = compiled(gpu, "move_panel", torch.float32, constants, Launch(0, 32, 1, 3))
    assert spilled_bytes(kernel, gpu, tmp_path) == 0

"""The C++ products on ARM: compiled for it, run by an emulator, and compared with this processor's bits.

apt install g++-aarch64-linux-gnu qemu-user     # and, for Apple's kind of compiler, clang
"""

from __future__ import annotations

import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from awq.kernels import cpu_native, native
from awq.kernels.cpu_decoding import attend, rms_norm
from awq.kernels.cpu_native import KINDS, _multiply, _prepare
from random_weights import random_weight

# A processor that has each set of instructions and not the next.
EMULATED = {"neon-dot": "neoverse-n1", "neon": "cortex-a57"}
COMPILERS = {"g++": ("aarch64-linux-gnu-g++",), "clang++": ("clang++", "--target=aarch64-linux-gnu")}
LAYERS = ((200, 480, 160, 4), (64, 256, 128, 4), (72, 96, 32, 8), (130, 40, 8, 4), (136, 320, 320, 8))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def built(compiler: str, name: str, folder: Path) -> Path:
    for needed in ("aarch64-linux-gnu-g++", COMPILERS[compiler][0], "qemu-aarch64"):
        if shutil.which(needed) is None:
            pytest.skip(f"needs {needed}")
    sources = [str(Path(__file__).parent / "product.cpp"), str(native._SOURCES / "w4.cpp")]
    options = [option for option in native._OPTIONS if option != "-shared"]
    program = folder / "product"
    subprocess.run(
        [*COMPILERS[compiler], *options, *native._flags(name), "-static", *sources, "-o", str(program)],
        check=True,
    )
    return program


def content(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("compiler", "name"), [("g++", "neon"), ("g++", "neon-dot"), ("clang++", "neon-dot")]
)
def test_arm_gives_the_same_bits(compiler: str, name: str, tmp_path: Path) -> None:
    here = cpu_native.load()
    if isinstance(here, str):
        pytest.skip(f"the C++ products cannot be used here, so there is nothing to compare with: {here}")
    program = built(compiler, name, tmp_path)
    asked, expected = [], []
    for (out, columns, group, bits), dtype, rows in itertools.product(LAYERS, DTYPES, (1, 7, 33)):
        scales = DTYPES[(rows + columns) % 3]
        weight = random_weight(out, columns, group, out, scales, bits)
        weight.codes[7] = (1 << bits) - 1
        inputs = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        inputs[0] = 127  # whose second smallest digit is -128
        inputs[-1, 0], inputs[-1, -1] = 1000.0, 1e-6
        inputs = inputs.to(dtype)
        for digits in (1, 2, 3):
            planes = 1 if bits <= 4 else 2
            header = (rows, columns, out, group, KINDS[dtype], KINDS[scales], planes, digits)
            asked.append(struct.pack("<8q", *header))
            asked += [content(part) for part in (weight.codes, weight.zeros.t(), weight.scales.t(), inputs)]
            expected.append(content(_multiply(here, inputs, _prepare(here, weight), digits)))
            expected.append(content(weight.codes))
    for dtype, rows, columns in itertools.product(DTYPES, (3, 37), (16, 272)):
        generator = torch.Generator().manual_seed(rows)
        x, weight, query, key, value = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((rows, columns), (columns,), (1, 4, 1, columns), *2 * [(1, 2, rows, columns)])
        )
        mask = torch.rand(1, 1, 1, rows, generator=generator) < 0.8
        asked.append(struct.pack("<8q", rows, columns, 0, 0, KINDS[dtype], 0, 0, 0))
        asked += [content(part) for part in (x, weight, query, key, value, mask)]
        expected.append(content(rms_norm(x, weight, 1e-5, 1.0, rounds=False)))
        expected.append(content(attend(query, key, value, mask, 0.2)))
    command = ["qemu-aarch64", "-cpu", EMULATED[name], str(program)]
    done = subprocess.run(command, input=b"".join(asked), capture_output=True, check=True)
    got = done.stdout
    assert len(got) == sum(map(len, expected))
    for case in expected:
        assert got[: len(case)] == case
        got = got[len(case) :]

"""What the tests of other engines share: their environments, and checkpoints of ours for them to load.

Each engine runs in a process of its own Python, where our package cannot be imported: a script of
`tests/engines/scripts` loads the checkpoint and writes down what it saw, and the test compares.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import awq
from awq import QuantConfig
from awq.formats import gemm
from awq.search import full_range, nearest
from awq.weight import QuantizedWeight

SCRIPTS = Path(__file__).parent / "scripts"
# No engine may look for anything on a network.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}


@pytest.fixture(scope="session")
def engine() -> Callable[..., Any]:
    """`engine(name, script, *arguments)`: what the script wrote, as JSON values.

    The script gets the path of the file to write as its first argument. `ours` lets it import our package.
    The test is skipped when the environment is not there.
    """

    def run(name: str, script: str, *arguments: Any, ours: bool = False) -> Any:
        variable = f"AWQ_ENGINE_{name.upper().replace('-', '_')}"
        python = os.environ.get(variable)
        if not python:
            pytest.skip(f"{variable} is unset: `scripts/engines {name}` makes that environment and prints it")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | _OFFLINE
        if ours:
            environment["PYTHONPATH"] = str(Path(awq.__file__).parents[1])
        command = [python, str(SCRIPTS / script), *map(str, arguments)]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        return json.loads(Path(arguments[0]).read_text())

    return run


@pytest.fixture(scope="session")
def books_awq(books6m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in groups of 128: hidden 256, FFN 768, 4 heads of 64 with 2 for keys, bfloat16."""
    out = tmp_path_factory.mktemp("engines") / "books"
    awq.quantize(books6m, out, QuantConfig(group_size=128), samples=8, seq_len=128)
    return out


@pytest.fixture(scope="session")
def rounded_pair() -> Callable[..., tuple[Path, Path]]:
    """See `write_pair`."""
    return write_pair


def write_pair(
    model: Any, folder: Path, left_float: Callable[[str], bool], symmetric: bool = False
) -> tuple[Path, Path]:
    """Write a model's checkpoint with every 2-D weight rounded to codes in groups of 32, and its twin.

    The names are those that transformers saves, which are the hub's: each expert's layers by themselves.

    Args:
        model: a model on the CPU.
        folder: where `awq`, the quantized checkpoint, and `float`, the values it stands for, are put.
        left_float: whether the layer of a name is no linear layer, or stays as it is.
        symmetric: all zero points are 8, the middle code.
    """
    for name in ("awq", "float"):
        model.save_pretrained(folder / name)
    values = load_file(folder / "float" / "model.safetensors")
    stored, skipped = {}, []
    for key, tensor in list(values.items()):
        stem, _, leaf = key.rpartition(".")
        if tensor.dim() != 2 or leaf != "weight" or left_float(stem):
            stored[key] = tensor
            if tensor.dim() == 2 and "embed" not in stem:
                skipped.append(stem)
            continue
        low, high = full_range(tensor.float(), 32)
        if symmetric:
            half = torch.maximum(-low / 8, high / 7)
            low, high = -8 * half, 7 * half
        codes = nearest(tensor.float(), low, high, 4, torch.float16)
        weight = QuantizedWeight(codes.codes, codes.scales, codes.zeros, 4)
        values[key] = weight.dequantize(tensor.dtype)
        stored |= {f"{stem}.{suffix}": part for suffix, part in gemm.pack(weight).items()}
    save_file(values, folder / "float" / "model.safetensors", {"format": "pt"})
    save_file(stored, folder / "awq" / "model.safetensors", {"format": "pt"})
    file = folder / "awq" / "config.json"
    config = json.loads(file.read_text()) | {
        "quantization_config": QuantConfig(group_size=32).to_hf(sorted(skipped))
    }
    file.write_text(json.dumps(config))
    return folder / "awq", folder / "float"

"""mlx-lm on the CPU reads the folder as it is: an unpacking and an arithmetic that are not ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import awq
from awq import QuantConfig
from awq.model.quantized import QuantizedCheckpoint
from awq.pipeline.convert import convert

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]


@pytest.fixture(params=[128, 32], ids=["groups of 128", "groups of 32"])
def folder(
    request: pytest.FixtureRequest, books6m: Path, books_awq: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == 128:
        return books_awq
    out = tmp_path_factory.mktemp("mlx") / "books"
    awq.quantize(books6m, out, QuantConfig(group_size=request.param, method="rtn"), samples=1, seq_len=32)
    return out


def test_mlx_reads_our_codes_and_computes_our_logits(
    folder: Path, books6m: Path, engine: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    ids = np.array([[(i * 37 + row) % 4096 for i in range(64)] for row in (11, 500)], dtype=np.int64)
    np.save(tmp_path / "ids.npy", ids)
    files = [tmp_path / name for name in ("ids.npy", "logits.npy", "weights.npz")]
    groups = engine("mlx", "mlx_logits.py", tmp_path / "mlx.json", folder, *files)

    checkpoint = QuantizedCheckpoint(folder)
    values = {name: checkpoint.values(name) for name in checkpoint.layers}
    assert groups.keys() == values.keys()
    theirs = np.load(files[2])
    for name, value in values.items():
        # mlx holds -zero * scale in float16, the scales' own dtype, where we hold the two apart.
        step = value.abs().max() * 2**-10
        assert float((value - torch.from_numpy(theirs[name])).abs().max()) <= step, name

    model = AutoModelForCausalLM.from_pretrained(books6m, dtype=torch.float32).eval()
    state = model.state_dict()
    stored = checkpoint.reader.read([key for key in checkpoint.reader.tensors if key in state])
    state |= {key: tensor.float() for key, tensor in stored}
    state |= {f"{name}.weight": value for name, value in values.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits
    difference = (expected - torch.from_numpy(np.load(files[1]))).abs()
    # float16 throughout, 11 bits at each step of six blocks; the logits' standard deviation is 2.6.
    assert float(difference.max()) < 0.15
    assert float(difference.pow(2).mean().sqrt()) < 0.02


@pytest.mark.parametrize(
    ("family", "sizes"), [("mixtral", {"num_local_experts": 8}), ("olmoe", {"num_experts": 8})]
)
@torch.no_grad()
def test_mlx_stacks_the_experts_of_our_export(
    family: str, sizes: dict[str, int], tiny: Any, engine: Callable[..., Any], tmp_path: Path
) -> None:
    """mlx-lm stacks experts before it looks at AWQ's layout, so it takes them in its own layout only."""
    from transformers import AutoModelForCausalLM, AwqConfig

    # All experts for each token: in float16 one near the border between two would go to the other one.
    heads = {"num_key_value_heads": 4, "num_experts_per_tok": 8}
    tiny(family, **heads, **sizes).save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 128, (12, 64), generator=generator)
    out, mlx = tmp_path / "awq", tmp_path / "mlx"
    awq.quantize(tmp_path / "model", out, QuantConfig(group_size=64), rows.tolist(), seq_len=64)
    convert(out, mlx, "mlx")
    np.save(tmp_path / "ids.npy", rows[:2].numpy())
    files = [tmp_path / name for name in ("ids.npy", "logits.npy", "weights.npz")]
    engine("mlx", "mlx_logits.py", tmp_path / "mlx.json", mlx, *files)
    exact = AwqConfig(backend="torch")
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=exact)
    expected = ours(rows[:2]).logits.numpy()
    got = np.load(files[1])
    assert np.abs(got - expected).max() < 0.05 * expected.std()

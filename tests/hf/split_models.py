"""A program: models split over two accelerators that are not there, against the same models in one piece.

Its argument is a folder; the last line of its output is JSON: for each family and way of placing it, where
the quantized layers are, how far the logits are off, and what was warned.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AwqConfig
from two_gpus import install

import awq
from awq import AutoAWQForCausalLM
from awq.kernels.torch_dequant import TorchDequant
from awq.nn import QuantLinear
from conftest import tiny_model
from rounded import prompt, quantized_pair, relative

BLOCKS = 4
FAMILIES = {
    "llama": ("llama", {"num_key_value_heads": 2, "attention_bias": True}),
    "tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
}
EAGER = {"kernel": "torch", "attn_implementation": "eager", "dtype": torch.float32}
AROUND = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
IN_BLOCK = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


def blocks(devices: list[Any]) -> dict[str, Any]:
    return {f"model.layers.{number}": device for number, device in enumerate(devices)}


def ways(folder: Path, work: Path, size: int) -> dict[str, Callable[[], Any]]:
    """Functions that load the checkpoint, by name."""
    ends = {"lm_head": 0} if "tied" in folder.parts else {}
    split = {"device_map": AROUND | ends | blocks([0, 1, 0, 1])}
    half = {0: size * 5 // 8, 1: size}
    on_first = dict.fromkeys(AROUND, 0)
    mlp_aside = on_first | {
        f"model.layers.{number}.{part}": "cpu" if part == "mlp" else 0
        for number in range(BLOCKS)
        for part in IN_BLOCK
    }
    aside = on_first | {"model.norm": "cpu"} | blocks([0, 1, "cpu", "disk"])
    disk = {"offload_folder": work / "offload"}
    load = awq.load_quantized
    return {
        "by blocks": lambda: load(folder, **split, **EAGER),
        "auto": lambda: load(folder, device_map="auto", max_memory=half, **EAGER),
        "limits alone": lambda: load(folder, max_memory=half, **EAGER),
        "AutoAWQ": lambda: AutoAWQForCausalLM.from_quantized(folder, max_memory=half, **EAGER).model,
        "transformers": lambda: AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=AwqConfig(backend="torch"),
            attn_implementation="eager",
            dtype=torch.float32,
            **split,
        ),
        "transformers, on the CPU": lambda: AutoModelForCausalLM.from_pretrained(
            folder,
            device_map=on_first | blocks([0, 1, "cpu", "cpu"]),
            attn_implementation="eager",
            dtype=torch.float32,
        ),
        "offloaded": lambda: load(folder, device_map=aside, **disk, **EAGER),
        "mlp offloaded": lambda: load(folder, device_map=mlp_aside, **EAGER),
        "fused": lambda: load(folder, fuse=True, max_seq_len=64, **split, **EAGER),
        "fused, offloaded": lambda: load(folder, fuse=True, device_map=aside, **disk, **EAGER),
    }


def products(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Logits, and how many products of the plain kernel they took."""
    forward, count = TorchDequant.forward, 0

    def counted(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        return forward(self, *args)

    TorchDequant.forward = counted
    try:
        return model(ids).logits, count
    finally:
        TorchDequant.forward = forward


@torch.no_grad()
def main(work: Path) -> dict[str, dict[str, Any]]:
    """Load each family each way, run it and let it generate."""
    ids, made, found = prompt(), {}, {}
    for family, (model_type, changes) in FAMILIES.items():
        model = tiny_model(model_type, num_hidden_layers=BLOCKS, **changes)
        folder, _ = quantized_pair(model, work / family)
        whole = awq.load_quantized(folder, **EAGER)
        made[family] = folder, whole(ids).logits, whole.generate(ids, max_new_tokens=4, do_sample=False)
    install()
    ids = ids.to("fake:0")
    for family, (folder, logits, tokens) in made.items():
        size = (folder / "model.safetensors").stat().st_size
        for way, load in ways(folder, work / family, size).items():
            if family != "llama" and way not in ("by blocks", "offloaded", "fused"):
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = load()
            got, count = products(model, ids)
            generated = model.generate(ids, max_new_tokens=4, do_sample=False)
            places: dict[str, list[str]] = {}
            for name, layer in model.named_modules():
                if isinstance(layer, QuantLinear):
                    device = {str(tensor.device) for tensor in layer.held_tensors()}
                    places.setdefault("+".join(sorted(device)), []).append(name)
            found[f"{family}: {way}"] = {
                "places": places,
                "on": str(got.device),
                "off": relative(got.cpu(), logits),
                "same tokens": torch.equal(generated.cpu(), tokens),
                "products": count,
                "warned": [str(warning.message) for warning in caught],
            }
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))

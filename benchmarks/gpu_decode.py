"""Decoding with a random Llama of 8B shapes, in bfloat16 and in 4 bits, with layers apart and merged.

Each as `generate()` does it by itself, with a static cache in a CUDA graph, and, with few blocks, compiled.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from awq.hf.fuse import fuse
from awq.nn import QuantLinear
from awq.search.rounding import full_range, nearest
from awq.weight import QuantizedWeight

PROMPT, NEW = 64, 96


@torch.no_grad()
def decode(blocks: int) -> dict[str, Any]:
    """Tokens per second at batch 1 of both models, and what was compared on the way."""
    model = _llama(blocks)
    ids = torch.randint(0, 32000, (1, PROMPT), device="cuda")
    speeds: dict[str, float] = {}
    notes: dict[str, Any] = {}
    for name, change in (("bfloat16", None), ("4 bits", _quantize), ("4 bits, merged", fuse)):
        if change is not None:
            change(model)
        notes[f"GB of weights, {name}"] = round(_bytes(model) / 1e9, 2)
        speeds[f"{name}, generate()"] = _generate(model, ids)
        captured = _Captured(model, ids)
        speeds[f"{name}, static cache in a CUDA graph"] = captured.speed()
        notes[f"tokens of the graph are those of plain calls, {name}"] = captured.agrees()
        del captured
    return {"tokens/s": speeds, "notes": notes, "blocks": blocks}


@torch.no_grad()
def compiled(blocks: int = 4) -> dict[str, Any]:
    """The same with a model of few blocks that transformers compiles by itself, its cache being static."""
    model = _llama(blocks)
    _quantize(model)
    ids = torch.randint(0, 32000, (1, PROMPT), device="cuda")
    speeds: dict[str, float] = {}
    for name in ("apart", "merged"):
        if name == "merged":
            fuse(model)
            torch._dynamo.reset()
            model.__dict__.pop("_compiled_call", None)  # of the layers apart
        captured = _Captured(model, ids)
        speeds[f"{name}, generate()"] = _generate(model, ids)
        speeds[f"{name}, static cache in a CUDA graph"] = captured.speed()
        speeds[f"{name}, generate(), static cache, compiled"] = _generate(
            model, ids, cache_implementation="static"
        )
        del captured
    return {"tokens/s": speeds, "blocks": blocks}


def _llama(blocks: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def _quantize(model: Any) -> None:
    """Round every projection of the blocks to 4 bits in groups of 128."""
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            weight = layer.weight.float()
            codes = nearest(weight, *full_range(weight, 128), bits=4, dtype=torch.float16)
            quantized = QuantLinear.from_weight(QuantizedWeight(*codes))
            quantized.prepare(torch.bfloat16)
            model.model.layers.set_submodule(name, quantized)


def _bytes(model: Any) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, QuantLinear):
            tensors += module.held_tensors()
    # Merged layers hold one arrangement together.
    return sum({part.data_ptr(): part.nbytes for part in tensors}.values())


def _generate(model: Any, ids: Tensor, **options: Any) -> float:
    for _ in range(3 if options else 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return NEW / seconds


class _Captured:
    """One step of greedy decoding on a static cache, as a CUDA graph."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        from transformers import StaticCache

        self.model, self.ids = model, ids
        self.cache = StaticCache(config=model.config, max_cache_len=512)
        self.token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
        self._start()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _start(self) -> None:
        self.cache.reset()
        logits = self.model(self.ids, past_key_values=self.cache).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    def _step(self) -> None:
        logits = self.model(self.token, past_key_values=self.cache).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    def speed(self) -> float:
        """Tokens per second of replays."""
        self._start()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(NEW):
            self.graph.replay()
        torch.cuda.synchronize()
        return NEW / (time.perf_counter() - started)

    def agrees(self) -> bool:
        """Whether replays give the tokens of plain calls."""
        runs = []
        for step in (self._step, self.graph.replay):
            self._start()
            tokens = []
            for _ in range(32):
                step()
                tokens.append(int(self.token))
            runs.append(tokens)
        return runs[0] == runs[1]

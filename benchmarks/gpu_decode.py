"""Decoding with a random Llama of 8B shapes, in bfloat16 and in 4 bits, with layers apart and merged.

As `generate()` does it by itself; as it does it with a static cache, for which transformers compiles the
model; and as bare replays of a CUDA graph of one token, of the model as it is and compiled, where no host is
waited for.
"""

from __future__ import annotations

import collections
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import CompileConfig

from awq.hf.fuse import fuse
from awq.hf.static import how_to_compile
from awq.nn import QuantLinear
from awq.search.rounding import full_range, nearest
from awq.weight import QuantizedWeight

PROMPT, NEW, CACHE = 64, 96, 512
_CHECKED = 16


@torch.no_grad()
def decode(blocks: int, dense: bool = True) -> dict[str, Any]:
    """Tokens per second at batch 1, what was compared on the way, and where the time of a token goes.

    Args:
        dense: measure the bfloat16 model too, for which the most is compiled.
    """
    ids = torch.randint(0, 32000, (1, PROMPT), device="cuda")
    found: dict[str, Any] = {"tokens/s": {}, "notes": {}, "profiles": {}, "blocks": blocks}
    model = _llama(blocks)
    for name, change in (("bfloat16", None), ("4 bits", _quantize), ("4 bits, merged", _fuse)):
        if change is not None:
            change(model)
        elif not dense:
            continue
        found["notes"][f"GB of weights, {name}"] = round(_bytes(model) / 1e9, 2)
        found["tokens/s"][f"{name}, generate()"] = _generate(model, ids)
        _capture(model, ids, name, False, found)
    _compile(model, ids, name, found)
    del model
    torch.cuda.empty_cache()
    if dense:
        _compile(_llama(blocks), ids, "bfloat16", found)
    return found


def _capture(model: Any, ids: Tensor, name: str, compiled: bool, found: dict[str, Any]) -> None:
    way = f"{name}, CUDA graph of the {'compiled model' if compiled else 'model as it is'}"
    captured = _Captured(model, ids, compiled)
    found["tokens/s"][way] = captured.speed()
    found["notes"][f"largest difference of logits to plain calls, {way}"] = captured.difference()
    found["profiles"][way] = captured.profile()
    print(way, found["tokens/s"][way], "tokens/s", flush=True)


def _compile(model: Any, ids: Tensor, name: str, found: dict[str, Any]) -> None:
    _capture(model, ids, name, True, found)
    torch._dynamo.reset()
    started = time.perf_counter()
    compiled = CompileConfig(mode=None, options=how_to_compile(model.device))
    static = {"cache_implementation": "static", "max_cache_len": CACHE, "compile_config": compiled}
    found["tokens/s"][f"{name}, generate(), static cache"] = _generate(model, ids, **static)
    found["notes"][f"seconds of its first three runs, {name}"] = round(time.perf_counter() - started, 1)
    print(found["tokens/s"], flush=True)


def _fuse(model: Any) -> None:
    """As loading with `fuse=True, max_seq_len=CACHE`, but that `generate` is told what cache to use."""
    fuse(model, CACHE)
    del model.generate


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
            max_new_tokens=NEW,
            eos_token_id=model.config.vocab_size,  # looked for as in any model, and never found
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return NEW / seconds


class _Captured:
    """One token of greedy decoding on a static cache, as a CUDA graph."""

    def __init__(self, model: Any, ids: Tensor, compiled: bool) -> None:
        from transformers import StaticCache

        self.model, self.ids = model, ids
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        self.token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
        self.logits = torch.zeros(model.config.vocab_size, dtype=model.dtype, device="cuda")
        torch._dynamo.reset()
        self.forward = self._forward
        if compiled:
            options = how_to_compile(model.device) | {"triton.cudagraphs": False}  # the graph is made here
            self.forward = torch.compile(self._forward, dynamic=False, fullgraph=True, options=options)
        self._start()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _forward(self, token: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        logits = self.model(token, past_key_values=cache).logits[:, -1]
        return logits[0], logits.argmax(-1, keepdim=True)

    def _start(self) -> None:
        self.cache.reset()
        self.token.copy_(self.model(self.ids, past_key_values=self.cache).logits[:, -1:].argmax(-1))

    def _step(self, plain: bool = False) -> None:
        logits, token = (self._forward if plain else self.forward)(self.token, self.cache)
        self.logits.copy_(logits)
        self.token.copy_(token)

    def speed(self) -> float:
        """Tokens per second of replays; the best of three runs."""
        best = float("inf")
        for _ in range(3):
            self._start()
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(NEW):
                self.graph.replay()
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return NEW / best

    def difference(self) -> float:
        """Largest relative difference between the logits of replays and of plain calls on the same tokens."""
        generator = torch.Generator("cuda").manual_seed(0)
        tokens = torch.randint(0, 32000, (_CHECKED, 1, 1), generator=generator, device="cuda")
        runs = []
        for step in (lambda: self._step(plain=True), self.graph.replay):
            self._start()
            logits = []
            for token in tokens:
                self.token.copy_(token)
                step()
                logits.append(self.logits.float().clone())
            runs.append(torch.stack(logits))
        return float(((runs[1] - runs[0]).norm(dim=1) / runs[0].norm(dim=1)).max())

    def profile(self, tokens: int = 4) -> list[dict[str, Any]]:
        """What runs on the GPU for one token, the most time first: names, microseconds and launches."""
        self._start()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(tokens):
                self.graph.replay()
            torch.cuda.synchronize()
        total: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for event in recorded.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                total[event.name][0] += event.time_range.elapsed_us() / tokens
                total[event.name][1] += 1 / tokens
        ordered = sorted(total.items(), key=lambda item: -item[1][0])
        return [{"name": name, "us": round(us, 1), "launches": n} for name, (us, n) in ordered]

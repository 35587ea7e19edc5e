"""One engine with one model, for `cpu_peers.py`: ENGINE MODEL THREADS, run by that engine's own Python.

Says a line when the model is ready, then answers each line `{"prefill": …, "decode": …, "seed": …}` with the
seconds until the first token and from there to the last. The prompt is random, and new each time.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

# Beside this file are others with names of packages, which engines would import instead.
sys.path.pop(0)

Measure = Callable[[list[int], int], tuple[float, float]]


def transformers_model(model: Any) -> Measure:
    import torch

    class Arrivals:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, tokens: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    @torch.inference_mode()
    def measure(prompt: list[int], decode: int) -> tuple[float, float]:
        ids, arrivals = torch.tensor([prompt]), Arrivals()
        options = {"min_new_tokens": decode + 1, "max_new_tokens": decode + 1, "do_sample": False}
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, streamer=arrivals, **options)
        _, first, *_, last = arrivals.times
        return first - started, last - first

    return measure


def awq(folder: str, words: list[str]) -> Measure:
    import torch

    from awq import load_quantized

    options: dict[str, Any] = {"kernel": "cpu-w4a8" if "w4a8" in words else None, "fuse": "fused" in words}
    options["head_bits"] = 8 if "head8" in words else None
    return transformers_model(load_quantized(folder, dtype=torch.bfloat16, **options))


def dense(folder: str) -> Measure:
    import torch
    from transformers import AutoModelForCausalLM

    return transformers_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())


def openvino(folder: str) -> Measure:
    from optimum.intel import OVModelForCausalLM

    return transformers_model(OVModelForCausalLM.from_pretrained(folder, device="CPU"))


def vllm(folder: str) -> Measure:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=1,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def seconds(prompt: list[int], tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        return time.perf_counter() - started

    def measure(prompt: list[int], decode: int) -> tuple[float, float]:
        first = seconds(prompt, 1)
        return first, seconds(prompt, decode + 1) - first

    return measure


def llamacpp(file: str, threads: int) -> Measure:
    from llama_cpp import Llama

    model = Llama(file, n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)

    def measure(prompt: list[int], decode: int) -> tuple[float, float]:
        model.reset()
        started = time.perf_counter()
        model.eval(prompt)
        token = model.sample(temp=0.0)
        first = time.perf_counter()
        for _ in range(decode):
            model.eval([token])
            token = model.sample(temp=0.0)
        return first - started, time.perf_counter() - first

    return measure


def main(engine: str, model: str, threads: str) -> None:
    os.environ["OMP_NUM_THREADS"] = threads
    # Standard output is for answers alone, whatever an engine prints.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if engine == "llamacpp":
        measure = llamacpp(model, int(threads))
    elif engine.startswith("awq"):
        measure = awq(model, engine.split("-"))
    else:
        measure = {"dense": dense, "vllm": vllm, "openvino": openvino}[engine](model)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        tokens = random.Random(asked["seed"])
        prompt = [tokens.randrange(1, asked["vocabulary"]) for _ in range(asked["prefill"])]
        print(json.dumps(measure(prompt, asked["decode"])), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

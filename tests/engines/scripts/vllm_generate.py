"""Greedy tokens of vLLM on the CPU, in one process: OUT.json FOLDER REQUEST.json.

The request holds `prompts` (lists of token ids), `tokens` (how many to generate) and `options` for LLM; the
result holds the tokens, the log-probability of each, the quantization that vLLM chose and its kernel.
"""

import json
import logging
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # Where the processor has AMX, vLLM would round activations to 8 bits.
    "VLLM_CPU_INT4_W4A8": "0",
}


def main(out: str, folder: str, request_file: str) -> None:
    from vllm import LLM, SamplingParams

    with open(request_file) as handle:
        request = json.load(handle)
    kernels = record_kernels()
    llm = LLM(folder, enforce_eager=True, max_model_len=128, max_num_seqs=8, seed=0, **request["options"])
    sampling = SamplingParams(
        temperature=0, max_tokens=request["tokens"], ignore_eos=True, logprobs=1, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = [result.outputs[0] for result in llm.generate(prompts, sampling, use_tqdm=False)]
    value = {
        "quantization": llm.llm_engine.model_config.quantization,
        "kernels": sorted(kernels),
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
            for output in outputs
        ],
    }
    with open(out, "w") as handle:
        json.dump(value, handle)


def record_kernels() -> set[str]:
    """The classes of the kernels that quantized layers were given, as they are chosen."""
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16

    chosen: set[str] = set()
    choose = auto_awq.choose_mp_linear_kernel

    def note(*args, **kwargs):
        kernel = choose(*args, **kwargs)
        chosen.add(kernel.__name__)
        return kernel

    for module in (auto_awq, auto_gptq, compressed_tensors_wNa16):
        module.choose_mp_linear_kernel = note
    return chosen


if __name__ == "__main__":
    logging.getLogger("vllm").setLevel(logging.WARNING)
    main(*sys.argv[1:])

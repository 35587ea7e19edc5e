"""vLLM on the CPU loads our checkpoints and generates the tokens that our own runtime does.

Two programs that add in different orders in bfloat16 choose differently where the two best tokens are as good
as equal. `TIE` says what that means here: a difference of logits, by our runtime. Up to the first such place
the tokens must be equal. Behind it both go on from different texts, so vLLM's own continuation is judged: our
runtime reads it, and at each place vLLM's choice must be ours or tied with it.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import awq
from awq import load_quantized
from awq.kernels import native

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.timeout(900)]

TOKENS = 64
TIE = 0.125
PROMPTS = [
    "The captain looked at the sea and said that",
    "It was the best of times, it was the worst of times,",
    "In the morning the old man went down to the village, where",
    '"I do not believe you," she answered.',
    "Chapter I.",
]


class Agreement(NamedTuple):
    """How many tokens were equal, and the largest difference of the log-probabilities of vLLM's tokens."""

    equal: int
    difference: float


def wants_avx512() -> None:
    """Skip the test where vLLM has no product for 4-bit weights: on x86 without AVX512."""
    if platform.machine() == "x86_64" and "avx512" not in native.available():
        pytest.skip(
            "vLLM's products for 4-bit weights on x86 need AVX512, which this processor does not have"
        )


def vllm(
    engine: Callable[..., Any],
    script: str,
    folder: Path,
    work: Path,
    prompts: list[list[int]],
    **options: Any,
) -> Any:
    """What `scripts/vllm_generate.py`, or `script`, found."""
    request = work / "request.json"
    request.write_text(json.dumps({"prompts": prompts, "tokens": TOKENS, "options": options}))
    return engine("vllm", script, work / "vllm.json", folder, request)


@torch.no_grad()
def read(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Our logits, float32 `[tokens, vocabulary]`, for each of `tokens` behind the prompt."""
    logits = model(torch.tensor([prompt + tokens])).logits[0].float()
    return logits[len(prompt) - 1 : -1]


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def agreement(model: Any, prompt: list[int], theirs: list[int], logprobs: list[float]) -> Agreement:
    """Assert what the module's docstring says."""
    ours = greedy(model, prompt)
    equal = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), TOKENS)
    logits = read(model, prompt, theirs)
    behind = logits.max(-1).values - logits.gather(-1, torch.tensor(theirs)[:, None])[:, 0]
    assert float(behind.max()) <= TIE, f"token {int(behind.argmax())} is {float(behind.max())} behind ours"
    if equal < TOKENS:
        best = logits[equal].topk(2).values
        assert float(best[0] - best[1]) <= TIE, f"token {equal} differs and is no near-tie: {best}"
    own = logits.log_softmax(-1).gather(-1, torch.tensor(theirs)[:, None])[:, 0]
    return Agreement(equal, float((own - torch.tensor(logprobs)).abs().max()))


def judge(engine: Callable[..., Any], folder: Path, work: Path, reference: Path, **options: Any) -> Any:
    """Assert that vLLM generates from `folder` what our runtime does from `reference`; what it told."""
    from transformers import AutoTokenizer

    wants_avx512()
    tokenizer = AutoTokenizer.from_pretrained(reference)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    found = vllm(engine, "vllm_generate.py", folder, work, prompts, **options)
    assert found["kernels"] == ["CPUWNA16LinearKernel"]
    model = load_quantized(reference)
    assert model.dtype == torch.bfloat16
    results = [
        agreement(model, prompt, tokens, logprobs)
        for prompt, tokens, logprobs in zip(prompts, found["tokens"], found["logprobs"], strict=True)
    ]
    assert max(result.equal for result in results) == TOKENS
    assert max(result.difference for result in results) < TIE
    return found


@pytest.mark.parametrize("options", [{"quantization": "awq"}, {}], ids=["named", "found"])
def test_vllm_generates_our_runtime_s_tokens(
    options: dict[str, Any], engine: Callable[..., Any], books_awq: Path, tmp_path: Path
) -> None:
    found = judge(engine, books_awq, tmp_path, books_awq, **options)
    assert found["quantization"] == "awq"


def test_vllm_generates_the_same_tokens_from_the_compressed_tensors_export(
    engine: Callable[..., Any], books_awq: Path, tmp_path: Path
) -> None:
    awq.export(books_awq, tmp_path / "compressed", "compressed-tensors")
    found = judge(engine, tmp_path / "compressed", tmp_path, books_awq)
    assert found["quantization"] == "compressed-tensors"


@pytest.fixture(scope="module")
def symmetric(books6m: Path, rounded_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model rounded to symmetric codes in groups of 32, with its tokenizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(books6m, dtype="auto")
    work = tmp_path_factory.mktemp("symmetric")
    folder, _ = rounded_pair(model, work, lambda stem: "embed" in stem, symmetric=True)
    for file in books6m.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("target", ["gptq", "gptq_v2"])
def test_vllm_generates_the_same_tokens_from_symmetric_codes_in_gptq_s_layout(
    target: str, engine: Callable[..., Any], symmetric: Path, tmp_path: Path
) -> None:
    awq.convert(symmetric, tmp_path / target, target)
    found = judge(engine, tmp_path / target, tmp_path, symmetric)
    assert found["quantization"] == "auto_gptq"


def test_vllm_refuses_asymmetric_codes_in_gptq_s_layout(
    engine: Callable[..., Any], books_awq: Path, tmp_path: Path
) -> None:
    """What `docs/formats.md` says of it; a new release may take them."""
    awq.convert(books_awq, tmp_path / "gptq", "gptq_v2")
    with pytest.raises(AssertionError, match="Unsupported quantization config: bits=4, sym=False"):
        vllm(engine, "vllm_generate.py", tmp_path / "gptq", tmp_path, [[5, 9]])


# Every token goes to all four experts, with the router's weights: were two of them chosen, rounding would
# now and then choose others, and nothing could be compared.
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 4, "num_key_value_heads": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
}


@pytest.mark.parametrize("model_type", EXPERTS)
def test_vllm_puts_every_expert_s_codes_where_they_belong(
    model_type: str, engine: Callable[..., Any], tiny: Any, rounded_pair: Any, tmp_path: Path
) -> None:
    """The experts' arithmetic is the script's own; see there."""
    from transformers import AutoModelForCausalLM

    wants_avx512()
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 128, "intermediate_size": 128}
    model = tiny(model_type, **sizes, **EXPERTS[model_type]).to(torch.bfloat16)
    folder, twin = rounded_pair(
        model, tmp_path, lambda stem: stem.endswith(("gate", "embed_tokens", "lm_head"))
    )
    prompts = [[5, 9, 77, 30], [100, 4], [64, 65, 66, 67, 68, 69]]
    found = vllm(engine, "vllm_experts.py", folder, tmp_path, prompts, skip_tokenizer_init=True)
    reference = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.bfloat16).eval()
    for prompt, tokens, logprobs in zip(prompts, found["tokens"], found["logprobs"], strict=True):
        assert agreement(reference, prompt, tokens, logprobs).difference < TIE

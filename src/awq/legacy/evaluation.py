"""AutoAWQ's `awq.evaluation.eval_utils`: judgements on texts and tasks that are fetched from the hub."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from awq.errors import CalibrationError, ConfigError, MissingDependencyError
from awq.evaluate import perplexity, run_tasks
from awq.hf import is_awq, load_float, load_quantized
from awq.model import fetch


def evaluate_perplexity(model: Any, tokenizer: Any) -> float:
    """Perplexity on the test split of WikiText-2, in windows of 2048 tokens; fetched from the hub.

    Raises:
        MissingDependencyError: `datasets` is not installed.
        CalibrationError: the text cannot be fetched.
    """
    other = "`awq eval MODEL --text FILE` takes a local text"
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"WikiText needs the `datasets` package: pip install 'openawq[datasets]'; {other}"
        ) from error
    try:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    except Exception as error:  # the library and the network raise many kinds
        first = str(error).splitlines()[:1]
        raise CalibrationError(f"WikiText cannot be fetched: {' '.join(first)}; {other}") from error
    ids = torch.tensor(tokenizer("\n\n".join(rows), verbose=False)["input_ids"])
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    return perplexity(model, ids, window=min(2048, limit), batch_size=1).value


def eval_mmlu(
    model_path: str = "gpt2",
    num_fewshot: int = 1,
    batch_size: int = 1,
    device: str = "cuda:0",
    task_use_pretrained: bool = False,
) -> None:
    """Run MMLU by lm-evaluation-harness, and print a line for each of its scores.

    Args:
        model_path: a folder, or a hub name, of a float or a quantized model.
        num_fewshot: examples shown before each question.
        batch_size: questions run at once.
        device: where the model goes; the CPU where there is no GPU.
        task_use_pretrained: no effect: the folder says whether it is quantized.

    Raises:
        MissingDependencyError: the harness is not installed.
        EvaluationError: the questions cannot be fetched.
        AwqError: the model cannot be loaded.
    """
    folder = fetch.resolve(model_path)
    place = "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
    load = load_quantized if is_awq(folder) else load_float
    model = load(folder, device_map=place)
    tokenizer = fetch.load_tokenizer(folder, False)
    for score in run_tasks(model, tokenizer, ["mmlu"], fewshot=num_fewshot, batch_size=batch_size):
        error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        print(f"{score.task}: {score.metric} {score.value:.4f}{error}")


def eval_librispeech(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: speech models are not judged here.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "eval_librispeech: speech models are not judged here; use the `evaluate` package on their transcripts"
    )

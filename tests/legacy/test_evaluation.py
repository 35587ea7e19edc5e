"""AutoAWQ's evaluation functions: what is fetched stands in a test for what the hub would give."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from awq.errors import CalibrationError, ConfigError, MissingDependencyError
from awq.evaluate.harness import TaskScore
from awq.legacy import evaluation


def test_wikitext_that_cannot_be_had_is_answered_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="an optional package of the product")

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(CalibrationError, match="no route; `awq eval MODEL --text FILE`"):
        evaluation.evaluate_perplexity(None, None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"openawq\[datasets\]"):
        evaluation.evaluate_perplexity(None, None)


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_mmlu_is_run_on_a_folder_and_its_scores_are_printed(
    kind: str,
    books6m: Path,
    quantized: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = {}

    def run_tasks(model: Any, tokenizer: Any, tasks: list[str], **options: Any) -> list[TaskScore]:
        given.update(options, tasks=tasks, vocabulary=len(tokenizer), model=model)
        return [TaskScore("mmlu", "acc", 0.25, 0.01, 4), TaskScore("mmlu", "other", 2.0, None, 4)]

    monkeypatch.setattr(evaluation, "run_tasks", run_tasks)
    folder = books6m if kind == "float" else quantized
    evaluation.eval_mmlu(str(folder), 2, 3, "cpu", task_use_pretrained=kind == "float")
    assert (given["tasks"], given["fewshot"], given["batch_size"]) == (["mmlu"], 2, 3)
    assert given["vocabulary"] == 4096
    assert hasattr(given["model"].config, "quantization_config") == (kind == "quantized")
    assert capsys.readouterr().out == "mmlu: acc 0.2500 ± 0.0100\nmmlu: other 2.0000\n"


def test_speech_models_are_answered_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="speech models are not judged here"):
        evaluation.eval_librispeech("whisper", num_samples=4)

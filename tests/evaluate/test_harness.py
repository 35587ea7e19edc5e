"""Tasks of lm-evaluation-harness on a model of ours, from a file made on the spot."""

from __future__ import annotations

import builtins
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from awq.cli.common import load_model, load_tokenizer
from awq.cli.main import app
from awq.errors import ConfigError, EvaluationError, MissingDependencyError, MissingFileError
from awq.evaluate import run_tasks

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'openawq[lm-eval]'",
)
TASK = """\
task: last_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def loaded(books6m: Path) -> tuple[Any, Any]:
    return load_model(str(books6m), "float32", "cpu"), load_tokenizer(str(books6m))


@pytest.fixture
def task_folder(tmp_path: Path, loaded: tuple[Any, Any]) -> Path:
    """A task that asks for the last word of five texts: two that the model finished itself, three absurd."""
    model, tokenizer = loaded
    sentences = ["it was the best of qwxz", "on the other hand brzk", "she did not know what to vvvq"]
    for beginning in ("He looked at her, and", "There was no one in the"):
        start = tokenizer(beginning, return_tensors="pt")
        said = tokenizer.decode(model.generate(**start, max_new_tokens=9, do_sample=False)[0])
        sentences.append(said.rpartition(" ")[0])  # the last word may be half said
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "sentences.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    (folder / "last_word.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.mark.engines
@needs_harness
def test_a_task_from_a_local_file_needs_no_network(task_folder: Path, loaded: Any) -> None:
    model, tokenizer = loaded
    (score,) = run_tasks(model, tokenizer, ["last_word"], include_path=task_folder, batch_size=2)
    assert (score.task, score.metric, score.samples) == ("last_word", "acc", 5)
    assert 0 < score.value < 1
    assert score.value == pytest.approx(_accuracy(model, tokenizer, task_folder))
    assert score.stderr is not None


@pytest.mark.engines
@needs_harness
def test_the_command_runs_tasks_on_a_model_and_its_original(
    task_folder: Path, books6m: Path, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["eval", str(books6m), "--against", str(books6m), "--tasks", "last_word", "--limit", "4"]
    result = CliRunner().invoke(
        app,
        [*arguments, "--include-path", str(task_folder), "--json", str(figures)],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    original, judged = json.loads(figures.read_text())
    assert original == judged  # the same model twice
    assert [score["samples"] for score in judged["tasks"]] == [4]


@pytest.mark.engines
@needs_harness
def test_an_unknown_task_is_refused(loaded: Any) -> None:
    with pytest.raises(ConfigError, match="no such task: no_such_task"):
        run_tasks(*loaded, ["no_such_task"])


@pytest.mark.engines
@needs_harness
def test_a_task_whose_data_is_missing_says_so(task_folder: Path, loaded: Any) -> None:
    (task_folder / "sentences.jsonl").unlink()
    with pytest.raises(EvaluationError, match="last_word could not be run"):
        run_tasks(*loaded, ["last_word"], include_path=task_folder)


def test_without_the_harness_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"openawq\[lm-eval\]"):
        run_tasks(None, None, ["anything"])


def test_numbers_and_folders_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit"):
        run_tasks(None, None, ["anything"], limit=0)
    with pytest.raises(MissingFileError, match="not a folder"):
        run_tasks(None, None, ["anything"], include_path=tmp_path / "absent")


def test_options_of_tasks_need_tasks(books6m: Path) -> None:
    with pytest.raises(ConfigError, match="belong to --tasks"):
        CliRunner().invoke(app, ["eval", str(books6m), "--limit", "4"], catch_exceptions=False)


def _accuracy(model: Any, tokenizer: Any, folder: Path) -> float:
    """The share of last words that the model itself would have said, token by token."""
    import torch

    right = []
    for line in (folder / "sentences.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        start = tokenizer(text.rpartition(" ")[0])["input_ids"]
        ids = tokenizer(text)["input_ids"]
        assert ids[: len(start)] == start
        said = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        right.append(said[len(start) - 1 : -1] == ids[len(start) :])
    return sum(right) / len(right)

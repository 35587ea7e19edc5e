"""Tasks of EleutherAI's lm-evaluation-harness on a model of ours. The harness is an optional package."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awq.errors import ConfigError, EvaluationError, MissingDependencyError, MissingFileError, first_line

# Resamples for the standard error of metrics that are no plain means; known to 3 % with so many.
_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One figure of one task.

    Args:
        task: name of the task.
        metric: `acc`, `perplexity`, …, with the filter applied to the answers where there is one.
        value: the figure.
        stderr: its standard error; None where the harness gives none.
        samples: answers it is made of.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 8,
) -> list[TaskScore]:
    """Run tasks on a loaded model.

    Args:
        model: a transformers causal language model, float or quantized.
        tokenizer: its tokenizer.
        tasks: names of the harness's tasks, or of those in `include_path`.
        limit: use this many samples of each task; all by default.
        fewshot: examples shown before each question; the task's own number by default.
        include_path: a folder with further tasks as YAML files. A task that reads a local file needs no
            network; data files are found from the current folder.
        batch_size: samples run at once.

    Raises:
        MissingDependencyError: the harness is not installed.
        ConfigError: a number has no meaning, or there is no such task.
        MissingFileError: `include_path` is no folder.
        EvaluationError: a task could not be run; its data could not be fetched, for one.
    """
    if batch_size < 1 or (limit is not None and limit < 1) or (fewshot is not None and fewshot < 0):
        raise ConfigError("batch_size and limit must be at least 1, and fewshot at least 0")
    if include_path is not None and not Path(include_path).is_dir():
        raise MissingFileError(f"{include_path} is not a folder with task files")
    harness = _harness()
    manager = harness.tasks.TaskManager(include_path=include_path)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        raise ConfigError(
            f"no such task: {', '.join(unknown) or '(none named)'}; the harness knows "
            f"{len(manager.all_tasks):,}, and --include-path adds those of a folder"
        )
    adapter = harness.models.huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints; figures for programs go to our output
            results = harness.evaluator.simple_evaluate(
                adapter,
                tasks=list(tasks),
                num_fewshot=fewshot,
                limit=limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
                task_manager=manager,
            )
    except Exception as error:  # tasks are programs of many authors, and read from the network
        raise EvaluationError(f"{', '.join(tasks)} could not be run: {first_line(error)}") from error
    return _scores(results)


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise MissingDependencyError(
            "tasks are run by lm-evaluation-harness, which is not installed: pip install 'openawq[lm-eval]'"
        ) from error
    # It logs every step; what matters comes back as figures or as an error.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def _scores(results: Any) -> list[TaskScore]:
    """The figures, from keys like `acc,none` and `acc_stderr,none`."""
    out = []
    for task, figures in results["results"].items():
        counts = results["n-samples"].get(task, {})
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = figures.get(f"{metric}_stderr,{filtered}")
            out.append(
                TaskScore(
                    task,
                    metric if filtered == "none" else f"{metric} ({filtered})",
                    float(value),
                    float(stderr) if isinstance(stderr, (int, float)) else None,
                    int(counts.get("effective", 0)),
                )
            )
    return out

"""How good a model is: perplexity, and how far it is from another one. And how fast."""

from awq.evaluate.divergence import Divergence, compare
from awq.evaluate.harness import TaskScore, run_tasks
from awq.evaluate.perplexity import Perplexity, perplexity
from awq.evaluate.speed import Speed, copy_bandwidth, generation_speeds
from awq.evaluate.text import document_ids, token_ids
from awq.evaluate.throughput import Throughput, throughput
from awq.evaluate.windows import Window, windows

__all__ = [
    "Divergence",
    "Perplexity",
    "Speed",
    "TaskScore",
    "Throughput",
    "Window",
    "compare",
    "copy_bandwidth",
    "document_ids",
    "generation_speeds",
    "perplexity",
    "run_tasks",
    "throughput",
    "token_ids",
    "windows",
]

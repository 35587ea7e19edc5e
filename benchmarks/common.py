"""What the benchmarks share: models, token ids, tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from awq.calibration import load_calibration
from awq.evaluate import document_ids

console = Console(soft_wrap=True, highlight=False)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to measure on, with its calibration and evaluation tokens."""

    name: str
    folder: Path
    calibration: Tensor
    evaluation: list[Tensor]
    window: int

    def float_model(self) -> Any:
        """The original in float32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()


def add_subject_options(parser: argparse.ArgumentParser, samples: int) -> None:
    """Options that say what to measure on; the bundled model by default."""
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="FOLDER:CALIB:EVAL[:SETTINGS]",
        help="a further Llama-like model with its texts; SETTINGS such as w4g64,w4g32",
    )
    parser.add_argument("--without-bundled", action="store_true", help="measure the models named alone")
    parser.add_argument("--samples", type=int, default=samples, help="calibration samples")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a sample and of a window")
    parser.add_argument("--windows", type=int, default=100, help="evaluation windows")
    parser.add_argument("--json", type=Path, help="write the figures here")


def subjects(
    options: argparse.Namespace, bundled_settings: str
) -> list[tuple[Subject, list[tuple[int, int]]]]:
    """The models named by the options, each with its (bits, group size) settings."""
    folder = resources.files("awq").joinpath("data/books6m")
    bundled = (Path(str(folder)), "bundled", "bundled", bundled_settings)
    rows = [] if options.without_bundled else [bundled]
    for item in options.model:
        path, calib, text, *rest = item.split(":")
        rows.append((Path(path), calib, text, rest[0] if rest else "w4g128"))
    return [
        (_subject(path, calib, text, options), [_setting(word) for word in words.split(",")])
        for path, calib, text, words in rows
    ]


def _setting(word: str) -> tuple[int, int]:
    bits, _, group = word.lower().removeprefix("w").partition("g")
    return int(bits), int(group)


def _subject(folder: Path, calib: str, text: str, options: argparse.Namespace) -> Subject:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = 4 * options.samples  # the reference takes samples of one length only
    found = load_calibration(calib, tokenizer, samples=wanted, seq_len=options.seq_len, long="truncate")
    whole = [sample for sample in found.samples if len(sample) == options.seq_len]
    stride = max(1, len(whole) // options.samples)
    calibration = torch.stack(whole[::stride][: options.samples])
    documents = held_out(text, tokenizer, options.windows, options.seq_len)
    return Subject(folder.name, folder, calibration, documents, options.seq_len)


def held_out(text: str, tokenizer: Any, windows: int, window: int) -> list[Tensor]:
    """Evaluation tokens: the beginning of each document, or as many windows of a single one."""
    documents = [ids[: windows * window] for ids in document_ids(text, tokenizer)]
    if len(documents) > 1:
        documents = [ids[:window] for ids in documents[:windows]]
    return documents


def finish(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the figures where asked, with what they were measured on."""
    figures["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")

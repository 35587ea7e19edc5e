"""OpenAWQ beside the real peers: the same model, calibration tokens and evaluation, all in one run.

Each peer runs in an environment and a process of its own, by a small script in `peer_workers` that calls the
peer's own interface, and leaves a checkpoint. All checkpoints are read by OpenAWQ and judged in float32.

    python benchmarks/peers.py --install          # makes the environments that are missing, in .peers
    python benchmarks/peers.py --only balanced autoawq --json peers.json
    python benchmarks/peers.py --only autoround-best --json peers.json   # adds a row to the others

`AWQ_ENGINE_PIP_OPTIONS` has more options for pip, as for `scripts/engines`.

What takes very long is measured when it is named only. Seconds count quantizing alone, between a loaded model
and one that is to be saved (opening and writing are part of it for OpenAWQ, which does them block by block),
in brackets those of the processor. What a peer imports meanwhile is left out, for all alike; the seconds of
the whole process hold it. Before each peer OpenAWQ's default runs again, and the whole seconds are compared
with that run's: machines are noisy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from awq import load_quantized
from awq.errors import AwqError
from awq.evaluate import Divergence, compare
from common import Subject, add_subject_options, console, finish, subjects
from peer_environments import OURS, WORKERS, last_error, prepare, python_of
from peer_rows import ROWS, Row, brief, show


@dataclasses.dataclass(frozen=True)
class Run:
    """What became of a worker: its answer, or its error, and the seconds of the whole process."""

    whole: float
    answer: dict[str, Any]
    error: str | None


def main() -> None:
    """Measure and print."""
    options = parsed()
    chosen = [name for name in ROWS if (name in options.only if options.only else not ROWS[name].slow)]
    environments = options.environments.absolute()
    missing = prepare(sorted({ROWS[name].peer for name in chosen}), environments, options.install)
    figures = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for subject, ((bits, group_size), *_) in subjects(options, options.settings):
        title = f"{subject.name} W{bits} g{group_size}"
        rows = figures.setdefault("rows", {}).setdefault(title, {})
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), subject, bits, group_size, options)
            for name in chosen:
                peer = ROWS[name].peer
                rows[name] = {"error": missing[peer]} if peer in missing else bench.measured(ROWS[name])
                console.print(f"{title} {ROWS[name].title}: {brief(rows[name])}", style="dim")
                finish(options, figures)
        show(title, rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject_options(parser, samples=128)
    parser.add_argument("--settings", default="w4g128", help="bits and group size for the bundled model")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--environments", type=Path, default=Path(".peers"), help="where the peers live")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each worker")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that a worker may take")
    parser.add_argument(
        "--mlx-blas",
        metavar="FILE",
        help="a BLAS for mlx, whose wheel for processors has the slow reference one",
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the workers' logs here")
    return parser.parse_args()


class Bench:
    """One model, with what every worker gets."""

    def __init__(
        self, folder: Path, subject: Subject, bits: int, group_size: int, options: argparse.Namespace
    ) -> None:
        self.folder, self.subject, self.options = folder, subject, options
        self.original = subject.float_model()
        samples, model = folder / "samples.json", folder / "model"
        samples.write_text(json.dumps(subject.calibration.tolist()))
        shutil.copytree(subject.folder, model)
        _speak_to_old_versions(model / "config.json")
        self.asked = {"model": str(model), "samples": str(samples), "bits": bits, "group_size": group_size}

    def measured(self, row: Row) -> dict[str, Any]:
        """A row's figures, or its error."""
        beside = None
        if row.peer != OURS:
            beside = self.run(ROWS["balanced"]).whole
        run = self.run(row)
        found = {"whole": run.whole, "beside": beside, "threads": self.options.threads, **run.answer}
        if run.error is None:
            try:
                divergence = self.judged()
                if "bits" not in found:  # a worker that leaves plain values says how wide its codes were
                    found["bits"] = bits_per_weight(self.subject.folder, self.out)
                found["divergence"] = dataclasses.asdict(divergence)
            except (AwqError, ValueError) as error:
                run = dataclasses.replace(run, error=f"its checkpoint cannot be judged: {error}")
        return found | {"error": run.error}

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def run(self, row: Row) -> Run:
        """Let a worker quantize the model."""
        shutil.rmtree(self.out, ignore_errors=True)
        answer = self.folder / "answer.json"
        answer.unlink(missing_ok=True)
        (self.folder / "job.json").write_text(
            json.dumps({**self.asked, "out": str(self.out), "options": row.options})
        )
        script = {OURS: "with_openawq.py"}.get(row.peer, f"with_{row.peer}.py")
        python = python_of(row.peer, self.options.environments.absolute())
        log = self.folder / "log"
        started = time.perf_counter()
        with log.open("w") as told:
            worker = subprocess.Popen(
                [str(python), str(WORKERS / script), str(self.folder)],
                env=self._environment(row.peer),
                cwd=self.folder,
                stdout=told,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = worker.wait(self.options.limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        whole = time.perf_counter() - started
        text = log.read_text(errors="replace")
        if self.options.keep:
            self.options.keep.mkdir(parents=True, exist_ok=True)
            name = next(name for name, known in ROWS.items() if known is row)
            (self.options.keep / f"{name}.log").write_text(text)
        if code == 0 and answer.exists():
            return Run(whole, json.loads(answer.read_text()), None)
        return Run(whole, {}, failure(code, text, self.options.limit))

    def judged(self) -> Divergence:
        """How near the checkpoint of the last run comes to the original."""
        from transformers import AutoModelForCausalLM

        if "quantization_config" in json.loads((self.out / "config.json").read_text()):
            model = load_quantized(self.out, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(self.out, dtype=torch.float32).eval()
        check_layers(self.original, model)
        return compare(model, self.original, self.subject.evaluation, window=self.subject.window)

    def _environment(self, peer: str) -> dict[str, str]:
        import awq

        threads = str(self.options.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= dict.fromkeys(names, threads)
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}
        if peer == OURS:
            environment["PYTHONPATH"] = str(Path(awq.__file__).parents[1])
        if peer == "mlx" and self.options.mlx_blas:
            environment["LD_PRELOAD"] = self.options.mlx_blas
        return environment


def _speak_to_old_versions(file: Path) -> None:
    """Say in a configuration what transformers 4 looks for under other names."""
    config = json.loads(file.read_text())
    rotary = config.get("rope_parameters") or {}
    if "rope_theta" in rotary:
        config.setdefault("rope_theta", rotary["rope_theta"])
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    file.write_text(json.dumps(config, indent=2))


def failure(code: int | None, log: str, limit: float) -> str:
    """Why a worker gave no answer."""
    if code is None:
        return f"not done after {limit:.0f} s"
    if code < 0:
        return f"killed by signal {-code}"
    return f"{last_error(log)} (exit status {code})"


def check_layers(original: Any, model: Any) -> None:
    """See that what is compared has the same float parts.

    Raises:
        ValueError: the embeddings or the head were quantized.
    """
    for part in ("get_input_embeddings", "get_output_embeddings"):
        wanted, got = getattr(original, part)().weight, getattr(model, part)().weight
        if got.shape != wanted.shape or (got.float() - wanted).abs().max() > 1e-3 * wanted.abs().max():
            raise ValueError(f"{part[4:].replace('_', ' ')} are not the original's")


def bits_per_weight(original: Path, quantized: Path) -> float:
    """Bits on disk for each weight that is stored in another way than it was, but for a head."""
    before, after = _sizes(original), _sizes(quantized)
    replaced = [name for name in before if name not in after and name != "lm_head.weight"]
    added = sum(size for name, (size, _) in after.items() if name not in before and name != "lm_head.weight")
    return 8 * added / sum(before[name][1] for name in replaced)


def _sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes and elements of each tensor."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                tensor = tensors.get_tensor(name)
                found[name] = (tensor.numel() * tensor.element_size(), tensor.numel())
    return found


if __name__ == "__main__":
    main()

"""The loop: open, plan, and for each block load, measure, choose, write, forget."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awq.calibration import WINDOWS, HeldOut, held_out, load_calibration
from awq.config import QuantConfig, Setting
from awq.errors import ConfigError, EvaluationError, OutputExistsError, WeightError
from awq.model import Skeleton, open_model, pick_device
from awq.model.fetch import Lazily, load_processor, load_tokenizer, resolve
from awq.model.invariance import prove
from awq.model.overrides import Overrides
from awq.model.sums import find_sums
from awq.pipeline.block import make_judge, quantize_block
from awq.pipeline.done import Done, tensors_of
from awq.pipeline.finish import REPORT_NAME, finish
from awq.pipeline.follow import Follower
from awq.pipeline.job import Job, Request, prepare
from awq.pipeline.journal import Journal, check_output, lock, open_journal, taken
from awq.pipeline.memory import give_back, large_pieces_apart, peak_memory
from awq.pipeline.mix import common_size
from awq.pipeline.observe import Batch, measure
from awq.pipeline.precision import float32_by_default, matmul_precision
from awq.pipeline.preflight import check_disk, scale_dtype
from awq.pipeline.report import BlockReport, Progress, Report, Silent, write_json
from awq.pipeline.skipped import not_converted
from awq.pipeline.stacks import holding
from awq.pipeline.tune import teaching, tune
from awq.pipeline.verdict import verdict_on
from awq.pipeline.writer import DEFAULT_SHARD_BYTES, ShardWriter
from awq.search import Codes


@torch.no_grad()
@float32_by_default()
@large_pieces_apart()
def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    calib: Any = "bundled",
    *,
    samples: int = 128,
    seq_len: int = 512,
    split: str | None = None,
    text_column: str = "text",
    tokenizer: Any = None,
    device: str = "auto",
    batch_tokens: int | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    overrides: Overrides | Mapping[str, Any] | str | Path | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Quantize a model folder to a new folder.

    One block is in memory at a time. A run that was killed continues when called again with the same
    arguments, and gives the same bytes.

    Args:
        model: a folder with safetensors weights, or a hub name.
        out: the folder to make.
        config: what to quantize to; 4 bits in groups of 128 by default.
        calib: calibration text: `bundled`, a text or jsonl file, `pileval`, `wikitext`, a hub data set, a
            list of texts, of token ids, or of chat messages (with images, for models that take some), or what
            the model's processor returned: one such input, or a list of them.
        samples: calibration samples.
        seq_len: tokens of a sample at most.
        split, text_column: of a data set.
        tokenizer: used on the text; the model's own by default. A processor serves for both.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        batch_tokens: tokens of a batch; from the free memory by default.
        max_shard_bytes: size of an output file at most.
        overwrite: replace a checkpoint, or unfinished work, in `out`.
        trust_remote_code: run modelling code that comes with the model.
        overrides: what is known better about this model: a TOML or JSON file, or what it holds.
        verify: compare what is saved with the original at the end, on text that calibration did not see.
        progress: told about the plan and each block.

    Raises:
        EvaluationError: the comparison found NaN or infinity; the checkpoint and its report are there.
        AwqError: see `awq.errors`; all but a full disk is found before any work is done.
    """
    from transformers import ProcessorMixin

    started = time.perf_counter()
    for name, value in (("batch_tokens", batch_tokens), ("max_shard_bytes", max_shard_bytes)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    known = Overrides.of(overrides)
    run = _Run(
        out=Path(out).expanduser(),
        config=known.joined(config or QuantConfig()),
        device=pick_device(device),
        progress=progress or Silent(),
        started=started,
    )
    folder = resolve(model)
    if run.out.resolve() == folder.resolve():
        raise OutputExistsError(f"the output folder is the model's own ({folder}); choose another one")
    skeleton = open_model(folder, trust_remote_code)
    processor = None
    if isinstance(tokenizer, ProcessorMixin):
        processor, tokenizer = tokenizer, tokenizer.tokenizer
    tokenizer = tokenizer or Lazily(load_tokenizer, folder, trust_remote_code)
    calibration = load_calibration(
        calib,
        tokenizer,
        processor=processor or Lazily(load_processor, folder, trust_remote_code),
        samples=samples,
        seq_len=seq_len,
        split=split,
        text_column=text_column,
        vocab_size=skeleton.vocabulary,
        spare=WINDOWS if verify else 0,
    )
    text = partial(held_out, calib, calibration, tokenizer, skeleton.vocabulary, skeleton.context)
    skeleton.reader.check_finite()
    request = Request(skeleton, calibration, run.config, known, run.device, batch_tokens, max_shard_bytes)
    threads = torch.get_num_threads()
    try:
        return run.go(request, overwrite, text if verify else None)
    finally:
        torch.set_num_threads(threads)


@dataclasses.dataclass
class _Run:
    """One run's fixed facts, and the clock."""

    out: Path
    config: QuantConfig
    device: torch.device
    progress: Progress
    started: float
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def go(self, request: Request, overwrite: bool, text: Callable[[], HeldOut | None] | None) -> Report:
        """Plan, work through the blocks, and judge what is saved on a text, if one is given."""
        settings = request.settings()
        unfinished = check_output(self.out, settings, overwrite)
        job = prepare(request, unfinished, self._choosing)
        check_disk(self.out, job.plan.disk_bytes - taken(self.out))
        skeleton, feed = request.skeleton, job.feed
        with lock(self.out):
            journal = open_journal(self.out, settings, feed.batch_tokens, overwrite)
            if job.plan.mix is not None and journal.mix is None:
                journal.mix = job.mix.to_dict()
                journal.save()
            writer = ShardWriter(journal.work, job.files.shards, journal.complete)
            self.progress.planned(job.plan)
            for note in job.notes:
                self.progress.note(note)
            if journal.resumed and len(journal.blocks) < len(job.blocks):
                states, state = journal.behind()
                feed.put(states)
                feed.restore(state)
            spent = self.seconds.get("mix", 0.0)
            self.seconds["prepare"] = time.perf_counter() - self.started - spent
            with matmul_precision("high" if self.device.type == "cuda" else "highest"):
                for index in range(len(journal.blocks), len(job.blocks)):
                    self._block(skeleton, job, index, writer, journal)
            with self._timed("write"):
                report = self._finish(skeleton, job, writer, journal)
            if text is not None:
                list_name = job.list_name
                del job, feed  # hidden states may be larger than all that follows
                report = self._verified(request, list_name, text, report)
            journal.close()
        self.seconds["total"] = time.perf_counter() - self.started
        if report.verdict is not None and report.verdict.grade == "broken":
            raise EvaluationError(f"{self.out}: {report.verdict.sentence}")
        return report

    def _finish(self, skeleton: Skeleton, job: Job, writer: ShardWriter, journal: Journal) -> Report:
        """Make a checkpoint of what is written."""
        reports = [BlockReport(entry["name"], entry["seconds"], entry["outcome"]) for entry in journal.blocks]
        self.seconds["total"] = time.perf_counter() - self.started
        report = Report(job.plan, self.config.to_dict(), reports, self.seconds, peak_memory(self.device))
        named = not_converted(skeleton, job.list_name, job.plan.skipped, job.plan.quantized)
        finish(skeleton, job.files, writer, journal, self.out, self.config, named, job.layers, report)
        return report

    def _verified(
        self,
        request: Request,
        list_name: str,
        text: Callable[[], HeldOut | None],
        report: Report,
    ) -> Report:
        """The same report with a verdict, which is also on disk. The checkpoint is complete before it."""
        with self._timed("verify"):
            verdict = verdict_on(
                self.out,
                request.skeleton,
                list_name,
                text,
                report,
                self.config,
                request.calibration,
                self.device,
            )
            report = dataclasses.replace(report, verdict=verdict, peak_bytes=peak_memory(self.device))
            write_json(self.out / REPORT_NAME, report.to_dict(timings=False))
        return report

    def _block(self, skeleton: Skeleton, job: Job, index: int, writer: ShardWriter, journal: Journal) -> None:
        """One block, from disk to disk."""
        name, settings, feed = f"{job.list_name}.{index}", job.mix.blocks[index], job.feed
        block = skeleton.model.get_submodule(name)
        before = dict(self.seconds)
        while True:
            try:
                done = self._worked(skeleton, job, block, index)
                break
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                feed.smaller()
                self.progress.note(f"out of memory: going on with batches of {feed.batch_tokens} tokens")
        self._tell(name, done)
        if not any(error < float("inf") for error in done.result.errors.values()):
            raise WeightError(f"{name} gives NaN or infinity on the calibration text, quantized or not")
        with self._timed("write"):
            writer.write(tensors_of(block, name, done, settings, self.config, skeleton, job.files))
            skeleton.unload(block)
            feed.hidden, feed.quantized = done.hidden, done.quantized
            spent = {key: self.seconds[key] - before.get(key, 0.0) for key in ("forward", "search")}
            report = BlockReport(name, spent, done.outcome())
            journal.batch_tokens = feed.batch_tokens  # the hidden states are cut that way
            journal.finish_block(dataclasses.asdict(report), feed.states(), feed.state())
            del done
            give_back()
        self.progress.block_done(index, report)

    def _worked(self, skeleton: Skeleton, job: Job, block: nn.Module, index: int) -> Done:
        """All that is computed for a block. Nothing outside of it changes: it may be tried again."""
        name, kind, feed = f"{job.list_name}.{index}", job.kinds[index], job.feed
        settings = job.mix.blocks[index]
        with self._timed("forward"):
            skeleton.load(block, name, self.device)
            long, single = feed.probes_at(index)
            sums = {}
            if feed.followed and self.config.correction:
                with matmul_precision("highest"):
                    sums = find_sums(block, kind.layers, lambda: long.run(block, self.device))
            seen = measure(
                block,
                kind.structure,
                kind.layers,
                feed.at(index),
                self.device,
                common_size(self.config),
                {place.reader for place in sums.values() if place.reader is not None},
                feed.followed,
            )
            with matmul_precision("highest"):
                proofs = prove(block, kind.folds, lambda: long.whole(block, self.device))
            behind = [p.run(block, self.device, keep=True).to(p.hidden.device) for p in (long, single)]
        stored = {
            parameter: job.files.dtypes[skeleton.keys[f"{name}.{parameter}"]]
            for parameter, _ in block.named_parameters()
        }
        # Blocks that share state would need a second one for the quantized blocks' states.
        follows = bool(feed.followed) and not feed.shares_state
        batches, outputs, quantized = feed.at(index), seen.outputs, None
        judge_own = make_judge(block, batches, outputs, self.device)
        correct = None
        if feed.followed:
            batches, outputs = feed.at(index, quantized=True), outputs[: feed.followed]
        if sums:
            there: dict[str | None, Sequence[torch.Tensor]] = {None: outputs}
            there.update(seen.sums)
            correct = Follower(block, sums, batches, there, self.device)
        parted = teaching if self.config.tune else (lambda every: (every, every))
        (taught, held), (targets, wanted) = parted(batches), parted(outputs)
        judge = make_judge(block, held, wanted, self.device)
        with self._timed("search"):
            result = quantize_block(
                block,
                lambda: skeleton.load(block, name, self.device),
                kind.structure,
                [proof.fold for proof in proofs if proof.holds],
                settings,
                seen.stats,
                judge,
                self.config,
                scale_dtype(self.config),
                stored,
                correct,
                partial(self._tuned, block, taught, targets, judge, settings) if self.config.tune else None,
            )
            own_error = result.errors[result.chosen]
            if follows:
                with holding(block, result.codes):
                    quantized = [b.run(block, self.device).to(b.hidden.device) for b in batches]
                    own_error = judge_own()
        return Done(result, seen, proofs, stored, seen.outputs + behind, quantized, own_error)

    def _tell(self, name: str, done: Done) -> None:
        """What deserves a line about a block."""
        for fold, change in done.dropped.items():
            self.progress.note(f"{name}: folding into {fold} dropped ({change:.1e})")
        for owner, item in done.seen.coverage.items():
            if item.starved:
                self.progress.note(
                    f"{name}.{owner}: {len(item.starved)} of {len(item.tokens)} experts saw too few tokens "
                    f"(down to {min(item.tokens)}) and are judged by what all of them saw; more samples help"
                )

    def _tuned(
        self,
        block: nn.Module,
        batches: Sequence[Batch],
        targets: Sequence[torch.Tensor],
        judge: Callable[[], float],
        settings: dict[str, Setting],
        codes: dict[str, Codes],
    ) -> dict[str, Codes]:
        bits = {name: setting.bits for name, setting in settings.items()}
        return tune(block, codes, batches, targets, self.config.tune, bits, self.device, judge)

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        """Around the pass that measures what the layers are quantized to."""
        self.progress.note(f"measuring what {self.config.target_bits} bits of a weight are best spent on")
        with self._timed("mix"):
            yield

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

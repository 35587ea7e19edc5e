"""The loop: open, plan, and for each block load, measure, choose, write, forget."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awq.calibration import WINDOWS, CalibrationSet, HeldOut, held_out, load_calibration
from awq.config import QuantConfig, Setting
from awq.errors import ConfigError, EvaluationError, OutputExistsError, WeightError
from awq.model import Skeleton, find_blocks, open_model, pick_device
from awq.model.fetch import Lazily, load_processor, load_tokenizer, resolve
from awq.model.invariance import prove
from awq.model.layers import linears_of
from awq.model.overrides import Overrides
from awq.pipeline.block import holding, make_judge, quantize_block
from awq.pipeline.discover import discover, float32_by_default, matmul_precision
from awq.pipeline.done import Done, tensors_of
from awq.pipeline.feed import Feed
from awq.pipeline.finish import REPORT_NAME, finish
from awq.pipeline.journal import Journal, check_output, lock, open_journal, recognise, taken
from awq.pipeline.kinds import KindPlan, require_layers, require_scales
from awq.pipeline.memory import batch_tokens_for, peak_memory, surrounding_bytes
from awq.pipeline.mix import Mix, choose, common_size, measure_model, narrowed
from awq.pipeline.observe import Batch, measure
from awq.pipeline.preflight import Files, check_disk, plan_files, predict_peak, scale_dtype
from awq.pipeline.report import BlockReport, Plan, Progress, Report, Silent, write_json
from awq.pipeline.skipped import left_float, not_converted
from awq.pipeline.tune import tune
from awq.pipeline.verdict import verdict_on
from awq.pipeline.writer import DEFAULT_SHARD_BYTES, ShardWriter
from awq.search import Codes


@torch.no_grad()
@float32_by_default()
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
        folder=resolve(model),
        out=Path(out).expanduser(),
        config=known.joined(config or QuantConfig()),
        overrides=known,
        device=pick_device(device),
        progress=progress or Silent(),
        started=started,
    )
    if run.out.resolve() == run.folder.resolve():
        raise OutputExistsError(f"the output folder is the model's own ({run.folder}); choose another one")
    skeleton = open_model(run.folder, trust_remote_code)
    processor = None
    if isinstance(tokenizer, ProcessorMixin):
        processor, tokenizer = tokenizer, tokenizer.tokenizer
    tokenizer = tokenizer or Lazily(load_tokenizer, run.folder, trust_remote_code)
    calibration = load_calibration(
        calib,
        tokenizer,
        processor=processor or Lazily(load_processor, run.folder, trust_remote_code),
        samples=samples,
        seq_len=seq_len,
        split=split,
        text_column=text_column,
        vocab_size=skeleton.vocabulary,
        spare=WINDOWS if verify else 0,
    )
    text = partial(held_out, calib, calibration, tokenizer, skeleton.vocabulary, skeleton.context)
    skeleton.reader.check_finite()
    threads = torch.get_num_threads()
    try:
        return run.go(
            skeleton, calibration, batch_tokens, max_shard_bytes, overwrite, text if verify else None
        )
    finally:
        torch.set_num_threads(threads)


@dataclasses.dataclass
class _Run:
    """One run's fixed facts, and the clock."""

    folder: Path
    out: Path
    config: QuantConfig
    overrides: Overrides
    device: torch.device
    progress: Progress
    started: float
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def go(
        self,
        skeleton: Skeleton,
        calibration: CalibrationSet,
        batch_tokens: int | None,
        max_shard_bytes: int,
        overwrite: bool,
        text: Callable[[], HeldOut | None] | None,
    ) -> Report:
        """Plan, work through the blocks, and judge what is saved on a text, if one is given."""
        list_name, blocks = find_blocks(skeleton.model, self.overrides.blocks)
        settings = self._settings(skeleton, calibration, batch_tokens, max_shard_bytes)
        unfinished = check_output(self.out, settings, overwrite)
        tokens = batch_tokens or batch_tokens_for(self.device, blocks, bool(self.config.tune))
        if unfinished is not None:
            # Both decide how sums are rounded, and so the bytes.
            tokens = unfinished.batch_tokens
            torch.set_num_threads(unfinished.threads)
        feed = Feed(skeleton, list_name, calibration.samples, tokens, self.device)
        kinds, kind_of_block = discover(
            skeleton, list_name, blocks, feed, self.config, self.device, self.overrides
        )
        require_layers(kind_of_block, self.config, blocks)
        idle = require_scales(kind_of_block, self.config)
        mix = self._mix(skeleton, list_name, kind_of_block, unfinished, calibration, tokens)
        plans = [narrowed(kind, held) for kind, held in zip(kind_of_block, mix.blocks, strict=True)]
        quantized = {
            skeleton.keys[f"{list_name}.{i}.{name}.weight"]: (linears[name], setting)
            for i, linears in enumerate(map(linears_of, blocks))
            for name, setting in mix.blocks[i].items()
        }
        layers = {key.removesuffix(".weight"): setting for key, (_, setting) in quantized.items()}
        files = plan_files(skeleton, list_name, quantized, self.config, max_shard_bytes)
        skipped = left_float(skeleton, list_name, plans)
        hidden_bytes = sum(tensor.nbytes for tensor in feed.hidden)
        check_disk(self.out, files.bytes + 2 * hidden_bytes - taken(self.out))
        with lock(self.out):
            journal = open_journal(self.out, settings, feed.batch_tokens, overwrite)
            if self.config.target_bits is not None and journal.mix is None:
                journal.mix = mix.to_dict()
                journal.save()
            writer = ShardWriter(journal.work, files.shards, journal.complete)
            plan = Plan(
                model=str(self.folder),
                architecture=type(skeleton.model).__name__,
                calibration=calibration.describe(),
                blocks=len(blocks),
                kinds=[
                    kind.describe([i for i in range(len(blocks)) if kind_of_block[i] is kind])
                    for kind in kinds
                ],
                quantized=list(layers),
                skipped=skipped,
                output_bytes=files.bytes,
                disk_bytes=files.bytes + 2 * hidden_bytes,
                peak_bytes=predict_peak(
                    blocks,
                    kind_of_block,
                    feed.batch_tokens,
                    surrounding_bytes(skeleton, list_name, feed.has_images),
                    hidden_bytes,
                ),
                device=str(self.device),
                batch_tokens=feed.batch_tokens,
                resumed_at=len(journal.blocks),
                mix={"bits": mix.bits, "layers": layers} if self.config.target_bits is not None else None,
            )
            self.progress.planned(plan)
            for note in idle:
                self.progress.note(note)
            if files.unused:
                first, count = files.unused[0], len(files.unused)
                self.progress.note(f"{count} tensors the model does not use are carried over ({first} …)")
            if journal.resumed and len(journal.blocks) < len(blocks):
                states, state = journal.behind()
                feed.put(states)
                feed.restore(state)
            self.seconds["prepare"] = time.perf_counter() - self.started
            with matmul_precision("high" if self.device.type == "cuda" else "highest"):
                for index in range(len(journal.blocks), len(blocks)):
                    kind, held = plans[index], mix.blocks[index]
                    name = f"{list_name}.{index}"
                    self._block(skeleton, name, index, kind, held, feed, files, writer, journal)
            with self._timed("write"):
                reports = [
                    BlockReport(entry["name"], entry["seconds"], entry["outcome"]) for entry in journal.blocks
                ]
                self.seconds["total"] = time.perf_counter() - self.started
                report = Report(plan, self.config.to_dict(), reports, self.seconds, peak_memory(self.device))
                named = not_converted(skeleton, list_name, skipped, plan.quantized)
                finish(skeleton, files, writer, journal, self.out, self.config, named, layers, report)
            if text is not None:
                del feed  # its hidden states may be larger than all that follows
                report = self._verified(skeleton, list_name, calibration, text, report)
            journal.close()
        self.seconds["total"] = time.perf_counter() - self.started
        if report.verdict is not None and report.verdict.grade == "broken":
            raise EvaluationError(f"{self.out}: {report.verdict.sentence}")
        return report

    def _verified(
        self,
        skeleton: Skeleton,
        list_name: str,
        calibration: CalibrationSet,
        text: Callable[[], HeldOut | None],
        report: Report,
    ) -> Report:
        """The same report with a verdict, which is also on disk. The checkpoint is complete before it."""
        with self._timed("verify"):
            verdict = verdict_on(
                self.out, skeleton, list_name, text, report, self.config, calibration, self.device
            )
            report = dataclasses.replace(report, verdict=verdict, peak_bytes=peak_memory(self.device))
            write_json(self.out / REPORT_NAME, report.to_dict(timings=False))
        return report

    def _mix(
        self,
        skeleton: Skeleton,
        list_name: str,
        kind_of_block: list[KindPlan],
        unfinished: Journal | None,
        calibration: CalibrationSet,
        batch_tokens: int,
    ) -> Mix:
        """What each layer is quantized to: under a budget, by a pass of its own over all blocks."""
        if self.config.target_bits is None:
            uniform = [dict.fromkeys(kind.layers, self.config.setting) for kind in kind_of_block]
            return Mix(uniform, float(self.config.bits))
        if unfinished is not None and unfinished.mix is not None:
            return Mix.from_dict(unfinished.mix)
        self.progress.note(f"measuring what {self.config.target_bits} bits of a weight are best spent on")
        with self._timed("mix"):
            while True:
                feed = Feed(skeleton, list_name, calibration.samples, batch_tokens, self.device)
                try:
                    units = measure_model(skeleton, list_name, kind_of_block, feed, self.config, self.device)
                    return choose(units, self.config.target_bits)
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    feed.smaller()
                    batch_tokens = feed.batch_tokens

    def _settings(
        self, skeleton: Skeleton, calibration: CalibrationSet, batch_tokens: int | None, max_shard_bytes: int
    ) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        import transformers

        import awq

        return {
            "config": self.config.to_dict(),
            "overrides": self.overrides.to_dict(),
            "model": recognise(skeleton.reader),
            "calibration": calibration.fingerprint(),
            "batch_tokens": batch_tokens,
            "max_shard_bytes": max_shard_bytes,
            "device": self.device.type,
            "openawq": awq.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }

    def _block(
        self,
        skeleton: Skeleton,
        name: str,
        index: int,
        kind: KindPlan,
        settings: dict[str, Setting],
        feed: Feed,
        files: Files,
        writer: ShardWriter,
        journal: Journal,
    ) -> None:
        """One block, from disk to disk."""
        block = skeleton.model.get_submodule(name)
        before = dict(self.seconds)
        while True:
            try:
                done = self._worked(skeleton, name, block, index, kind, settings, feed, files)
                break
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                feed.smaller()
                self.progress.note(f"out of memory: going on with batches of {feed.batch_tokens} tokens")
        self._tell(name, done)
        if not any(error < float("inf") for error in done.result.errors.values()):
            raise WeightError(f"{name} gives NaN or infinity on the calibration text, quantized or not")
        with self._timed("write"):
            writer.write(tensors_of(block, name, done, settings, self.config, skeleton, files))
            skeleton.unload(block)
            feed.hidden, feed.quantized = done.hidden, done.quantized
            spent = {key: self.seconds[key] - before.get(key, 0.0) for key in ("forward", "search")}
            report = BlockReport(name, spent, done.outcome())
            journal.batch_tokens = feed.batch_tokens  # the hidden states are cut that way
            journal.finish_block(dataclasses.asdict(report), feed.states(), feed.state())
        self.progress.block_done(index, report)

    def _worked(
        self,
        skeleton: Skeleton,
        name: str,
        block: nn.Module,
        index: int,
        kind: KindPlan,
        settings: dict[str, Setting],
        feed: Feed,
        files: Files,
    ) -> Done:
        """All that is computed for a block. Nothing outside of it changes: it may be tried again."""
        with self._timed("forward"):
            skeleton.load(block, name, self.device)
            seen = measure(
                block, kind.structure, kind.layers, feed.at(index), self.device, common_size(self.config)
            )
            long, single = feed.probes_at(index)
            with matmul_precision("highest"):
                proofs = prove(block, kind.folds, lambda: long.whole(block, self.device))
            behind = [p.run(block, self.device, keep=True).to(p.hidden.device) for p in (long, single)]
        stored = {
            parameter: files.dtypes[skeleton.keys[f"{name}.{parameter}"]]
            for parameter, _ in block.named_parameters()
        }
        # Blocks that share state would need a second one for the quantized blocks' states.
        follows = bool(self.config.tune) and not feed.shares_state
        batches, quantized = feed.at(index, quantized=follows), None
        with self._timed("search"):
            result = quantize_block(
                block,
                lambda: skeleton.load(block, name, self.device),
                kind.structure,
                [proof.fold for proof in proofs if proof.holds],
                settings,
                seen.stats,
                make_judge(block, batches, seen.outputs, self.device),
                self.config,
                scale_dtype(self.config),
                stored,
                partial(self._tuned, block, batches, seen.outputs, settings) if self.config.tune else None,
            )
            if follows:
                with holding(block, result.codes):
                    quantized = [b.run(block, self.device).to(b.hidden.device) for b in batches]
        return Done(result, seen, proofs, stored, seen.outputs + behind, quantized)

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
        batches: list[Batch],
        targets: list[torch.Tensor],
        settings: dict[str, Setting],
        codes: dict[str, Codes],
    ) -> dict[str, Codes]:
        bits = {name: setting.bits for name, setting in settings.items()}
        return tune(block, codes, batches, targets, self.config.tune, bits, self.device)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

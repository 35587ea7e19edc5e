"""A run's memory: what it refuses to mix, and that no moment of dying makes it forget or lie."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from awq import QuantConfig
from awq.errors import DiskFullError, OutputError, OutputExistsError, ResumeError
from awq.hf import load_quantized
from awq.pipeline import BlockReport, Plan, quantize
from awq.pipeline.journal import WORK_FOLDER, lock

SMALL = QuantConfig(group_size=32, scale_steps=3, rounding="nearest")  # quick
IDS = [list(range(3, 43)), list(range(50, 71)), [9]]


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


class KillAt:
    """A progress that ends the run behind a block, and remembers what it was told."""

    def __init__(self, block: int | None = None) -> None:
        self.block = block
        self.plan: Plan | None = None
        self.notes: list[str] = []
        self.done: list[int] = []

    def planned(self, plan: Plan) -> None:
        self.plan = plan

    def block_done(self, number: int, report: BlockReport) -> None:
        self.done.append(number)
        if number == self.block:
            raise Killed

    def note(self, message: str) -> None:
        self.notes.append(message)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three blocks; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", num_key_value_heads=2, num_hidden_layers=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an unbroken run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, out, SMALL, IDS)
    return contents(out)


@pytest.fixture
def unfinished(model: Path, tmp_path: Path) -> Path:
    """An output folder whose run was killed behind its first block."""
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", SMALL, IDS, progress=KillAt(0))
    return tmp_path / "out"


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_run_killed_behind_any_block_continues_there_to_the_same_bytes(
    block: int, model: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", SMALL, IDS, progress=KillAt(block))
    again = KillAt()
    quantize(model, tmp_path / "out", SMALL, IDS, progress=again)
    assert again.done == list(range(block + 1, 3))
    assert contents(tmp_path / "out") == whole


# Whatever changes something on disk, and which call of it the kill comes before.
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    "place",
    [
        "awq.pipeline.writer.ShardWriter._allocate",
        "awq.pipeline.writer.ShardWriter.write",
        "awq.pipeline.writer.ShardWriter.publish",
        "awq.pipeline.journal.Journal.save",
        "awq.pipeline.journal.save_file",
        "awq.pipeline.journal.write_json",
        "awq.pipeline.finish.write_json",
        "awq.pipeline.finish.shutil.copyfile",
        "os.replace",
        "os.unlink",
        "os.rmdir",
    ],
)
def test_a_kill_before_any_change_on_disk_loses_nothing(
    place: str,
    count: int,
    model: Path,
    tmp_path: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from _pytest.monkeypatch import derive_importpath

    name, target = derive_importpath(place, True)
    real, calls = getattr(target, name), []

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == count:
            raise Killed
        return real(*args, **kwargs)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(target, name, deadly)
        try:
            quantize(model, out, SMALL, IDS)
        except Killed:
            pass
        else:
            assert len(calls) < count  # not so many calls: an unbroken run
    if (out / "config.json").exists() and not (out / WORK_FOLDER / "journal.json").exists():
        with pytest.raises(OutputExistsError, match="finished checkpoint"):
            quantize(model, out, SMALL, IDS)
    else:
        quantize(model, out, SMALL, IDS)
    left = contents(out)
    left.pop(f"{WORK_FOLDER}/lock", None)  # an empty file, if the very last step was missed
    assert left == whole


def test_a_changed_configuration_of_the_model_is_not_mixed_in(
    model: Path, unfinished: Path, tmp_path: Path
) -> None:
    """The weights are the same, and yet every block behind would compute something else."""
    changed = Path(shutil.copytree(model, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ResumeError, match=r"other settings \(model: .*config\.json"):
        quantize(changed, unfinished, SMALL, IDS)


def test_the_same_model_elsewhere_continues(
    model: Path, unfinished: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    quantize(shutil.copytree(model, tmp_path / "moved"), unfinished, SMALL, IDS)
    assert contents(unfinished) == whole


def test_a_damaged_journal_is_refused_and_overwritten_on_demand(model: Path, unfinished: Path) -> None:
    for content in ("", "{", "[]", "{}", '{"settings": {}}'):
        (unfinished / WORK_FOLDER / "journal.json").write_text(content)
        with pytest.raises(ResumeError, match="journal of unfinished work is unreadable"):
            quantize(model, unfinished, SMALL, IDS)
    quantize(model, unfinished, SMALL, IDS, overwrite=True)
    load_quantized(unfinished)


def test_lost_hidden_states_are_refused(model: Path, unfinished: Path) -> None:
    (hidden,) = (unfinished / WORK_FOLDER).glob("hidden-*")
    hidden.write_bytes(hidden.read_bytes()[:-8])
    with pytest.raises(ResumeError, match=r"hidden-00001\.safetensors cannot be read"):
        quantize(model, unfinished, SMALL, IDS)


def test_threads_are_those_that_the_run_was_begun_with(
    model: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor's threads share out sums, and each way of sharing rounds them in another way."""
    from awq.pipeline import run

    real, seen = run.measure, []

    def measure(*arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return real(*arguments)

    monkeypatch.setattr(run, "measure", measure)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        quantize(model, unfinished, SMALL, IDS)
        assert seen == [before, before]
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_work_folders_left_without_a_journal_are_started_over(
    model: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    work = tmp_path / "out" / WORK_FOLDER
    work.mkdir(parents=True)
    (work / "journal.json.tmp").write_text("{")
    (work / "speech").mkdir()
    (work / "speech" / "config.json").write_text("{}")
    quantize(model, tmp_path / "out", SMALL, IDS)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_do_not_write_to_one_folder(overwrite: bool, model: Path, unfinished: Path) -> None:
    before = contents(unfinished)
    with lock(unfinished), pytest.raises(OutputError, match="another process"):
        quantize(model, unfinished, SMALL, IDS, overwrite=overwrite)
    assert contents(unfinished) == before
    quantize(model, unfinished, SMALL, IDS, overwrite=overwrite)


def test_smaller_batches_after_a_lack_of_memory_are_remembered(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states on disk are cut in the smaller batches, and belong to no others."""
    from awq.pipeline import run

    real = run.measure

    def measure(block: Any, structure: Any, layers: Any, batches: Any, *rest: Any) -> Any:
        if max(batch.hidden.shape[0] * batch.hidden.shape[1] for batch in batches) > 45:
            raise torch.OutOfMemoryError("pretended")
        return real(block, structure, layers, batches, *rest)

    monkeypatch.setattr(run, "measure", measure)
    quantize(model, tmp_path / "straight", SMALL, IDS, batch_tokens=80)
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", SMALL, IDS, batch_tokens=80, progress=KillAt(1))
    monkeypatch.undo()
    quantize(model, tmp_path / "out", SMALL, IDS, batch_tokens=80)
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "out"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_room_that_the_unfinished_work_takes_is_not_asked_for_again(
    model: Path, unfinished: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files were allocated whole: a disk with no room for a second copy has room to go on."""
    free = len(whole["model.safetensors"])  # nothing left for the hidden states
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, free))
    with pytest.raises(DiskFullError, match="free"):
        quantize(model, unfinished.parent / "elsewhere", SMALL, IDS)
    quantize(model, unfinished, SMALL, IDS)
    assert contents(unfinished) == whole


def test_a_disk_that_fills_up_with_hidden_states_is_an_error_of_ours(model: Path, tmp_path: Path) -> None:
    """They are written by another library, which has errors of its own."""
    import resource

    ids = [[5 + i % 100] * 100 for i in range(60)]  # 1.5 MB of hidden states, and 0.3 MB of weights
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
    try:
        with pytest.raises(DiskFullError, match=r"no room for .*hidden-00001"):
            quantize(model, tmp_path / "out", SMALL, ids)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out" / "config.json").exists()
    quantize(model, tmp_path / "out", SMALL, ids)
    load_quantized(tmp_path / "out")


def test_an_output_folder_that_cannot_be_made_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write"):
        quantize(model, tmp_path / "file" / "out", SMALL, IDS)
    with pytest.raises(OutputError, match=r"cannot write"):
        quantize(model, tmp_path / "file", SMALL, IDS, overwrite=True)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(OutputError, match="cannot write"):
            quantize(model, tmp_path / "closed" / "out", SMALL, IDS)


def test_an_output_folder_inside_the_models_own_is_not_copied_into_itself(
    model: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    for kill in (2, None):
        try:
            quantize(folder, folder / "awq", SMALL, IDS, progress=KillAt(kill))
        except Killed:
            (folder / "awq" / "left-behind.json").write_text("{}")
    assert set(contents(folder / "awq")) == {*whole, "left-behind.json"}

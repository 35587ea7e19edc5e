"""The whole road on small models: what is written, what is kept, what is refused."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from awq import QuantConfig
from awq.errors import (
    AwqError,
    CalibrationError,
    ConfigError,
    DiskFullError,
    OutputExistsError,
    ResumeError,
    WeightError,
)
from awq.hf import load_quantized
from awq.pipeline import BlockReport, Plan, quantize
from awq.pipeline.journal import WORK_FOLDER

SMALL = QuantConfig(group_size=32)


def unpack_by_hand(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """AutoAWQ's layout read nibble by nibble, written from its description alone: weight [out, in]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    rows, words = qweight.shape
    group = rows // qzeros.shape[0]
    weight = np.zeros((words * 8, rows), dtype=np.float64)
    for word in range(words):
        for nibble in range(8):
            column = word * 8 + order[nibble]
            codes = (qweight[:, word].astype(np.int64) >> (4 * nibble)) & 15
            zeros = (qzeros[:, word].astype(np.int64) >> (4 * nibble)) & 15
            for row in range(rows):
                g = row // group
                weight[column, row] = (codes[row] - zeros[g]) * float(scales[g, column])
    return weight


@pytest.fixture
def llama(tiny: Any, tmp_path: Path) -> Path:
    """A tiny random Llama with grouped-query attention, saved with a stray file and a stray tensor."""
    folder = tmp_path / "llama"
    tiny("llama", num_key_value_heads=2).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.head.weight"] = torch.arange(6, dtype=torch.float64).view(2, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "NOTICE").write_text("kept")
    (folder / "extra").mkdir()
    (folder / "extra" / "template.jinja").write_text("{{ kept }}")
    return folder


def test_the_checkpoint_holds_what_it_promises(llama: Path, tmp_path: Path, token_lists: Any) -> None:
    out = tmp_path / "out"
    report = quantize(llama, out, SMALL, token_lists)
    before, after = load_file(llama / "model.safetensors"), load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    for name in ("mtp.head.weight", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name]), name
    assert (out / "NOTICE").read_text() == "kept"
    assert (out / "extra" / "template.jinja").exists()
    assert not (out / WORK_FOLDER).exists()
    assert after["model.layers.0.mlp.down_proj.qweight"].shape == (128, 8)
    assert after["model.layers.0.mlp.down_proj.scales"].dtype == torch.float16
    assert "model.layers.0.mlp.down_proj.weight" not in after
    assert report.plan.quantized == [
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    load_quantized(out)  # the stray tensor is known to be one, and no reason to refuse
    assert "222 tokens" in report.plan.calibration  # 40*4 + 33 + 21 + 7 + 1: every token of every sample


def test_logits_are_those_of_the_layout_unpacked_independently(
    llama: Path, tmp_path: Path, token_lists: Any
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    quantize(llama, out, SMALL, token_lists)
    reference = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tensors = load_file(out / "model.safetensors")
    state = reference.state_dict()
    for name in list(state):
        stem = name.removesuffix(".weight")
        if f"{stem}.qweight" in tensors:
            parts = [tensors[f"{stem}.{leaf}"].numpy() for leaf in ("qweight", "qzeros", "scales")]
            state[name] = torch.from_numpy(unpack_by_hand(*parts)).float()
        else:
            state[name] = tensors[name].float()
    reference.load_state_dict(state)
    ids = torch.tensor([token_lists[0]])
    with torch.no_grad():
        expected = reference(ids).logits
        got = load_quantized(out, dtype=torch.float32, kernel="torch")(ids).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 16}),
        ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
        ("gpt_neox", {}),
        ("falcon", {"multi_query": True}),
        ("phi3", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    ],
)
def test_families_go_all_the_way_and_are_never_worse_than_rounding(
    family: str, changes: dict[str, Any], tiny: Any, tmp_path: Path, token_lists: Any
) -> None:
    tiny(family, **changes).save_pretrained(tmp_path / "in")
    report = quantize(tmp_path / "in", tmp_path / "out", SMALL, token_lists)
    for block in report.blocks:
        assert block.outcome["error"] <= block.outcome["errors"]["rtn"]
        assert {"rtn", "gptq"} <= block.outcome["errors"].keys()
    assert not any(".h." in name or ".layers." in name for name in report.plan.skipped)
    model = load_quantized(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([token_lists[0]])
    out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 44)


def test_folding_alone_leaves_the_whole_model_unchanged(tiny: Any, tmp_path: Path, token_lists: Any) -> None:
    """At 8 bits what remains of a fold's error would stand out against the rounding."""
    from transformers import AutoModelForCausalLM

    original = tiny("gemma2", num_key_value_heads=2, head_dim=16)
    original.save_pretrained(tmp_path / "in")
    config = QuantConfig(bits=8, group_size=32, format="float", dtype="float32")
    report = quantize(tmp_path / "in", tmp_path / "out", config, token_lists)
    assert any(block.outcome["scales"] for block in report.blocks)
    ids = torch.tensor([token_lists[0]])
    with torch.no_grad():
        expected = original(ids).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 0.02


def test_layers_that_do_not_divide_stay_float_with_their_siblings(
    tiny: Any, tmp_path: Path, token_lists: Any
) -> None:
    # 172 does not divide by 64; k and v of one head of 4 channels have 4 rows, which do not divide by 8.
    tiny(
        "llama", num_key_value_heads=1, head_dim=4, num_attention_heads=16, intermediate_size=172
    ).save_pretrained(tmp_path / "in")
    report = quantize(tmp_path / "in", tmp_path / "out", QuantConfig(group_size=64), token_lists)
    skipped = {
        k.removeprefix("model.layers.0."): v for k, v in report.plan.skipped.items() if "layers.0" in k
    }
    assert "172 input channels" in skipped["mlp.down_proj"]
    assert "4 output channels" in skipped["self_attn.k_proj"]
    assert "fuse it with self_attn.k_proj" in skipped["self_attn.q_proj"]
    assert "172 output" in skipped["mlp.gate_proj"]
    assert report.plan.quantized == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    load_quantized(tmp_path / "out")


def test_named_modules_are_left_alone(llama: Path, tmp_path: Path, token_lists: Any) -> None:
    config = QuantConfig(group_size=32, modules_to_not_convert=("layers.1.", "down_proj"))
    report = quantize(llama, tmp_path / "out", config, token_lists)
    assert all("layers.0." in name and "down_proj" not in name for name in report.plan.quantized)
    before, after = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "out"))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(before[name], after[name])


def test_shards_are_written_and_indexed(llama: Path, tmp_path: Path, token_lists: Any) -> None:
    quantize(llama, tmp_path / "one", SMALL, token_lists)
    quantize(llama, tmp_path / "many", SMALL, token_lists, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    single = load_file(tmp_path / "one" / "model.safetensors")
    assert set(together) == set(single) == set(index["weight_map"])
    assert all(torch.equal(together[name], single[name]) for name in single)
    load_quantized(tmp_path / "many")


def test_dtype_can_be_asked_for(llama: Path, tmp_path: Path, token_lists: Any) -> None:
    config = QuantConfig(group_size=32, dtype="float16")
    quantize(llama, tmp_path / "out", config, token_lists)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert tensors["mtp.head.weight"].dtype == torch.float64  # no weight of the model: carried over as it is
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_plain_rounding_is_what_it_says(llama: Path, tmp_path: Path, token_lists: Any) -> None:
    config = QuantConfig(group_size=32, method="rtn", format="float", dtype="float32")
    quantize(llama, tmp_path / "out", config, token_lists)
    weight = (
        load_file(llama / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].float().view(-1, 2, 32)
    )
    got = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    high, low = weight.amax(-1, keepdim=True).clamp_min(0), weight.amin(-1, keepdim=True).clamp_max(0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round()
    expected = ((weight / scale).round() + zero).clamp(0, 15).sub(zero).mul(scale).view(128, 64)
    # A weight half-way between two codes may fall either way.
    steps = ((got - expected).abs().view(128, 2, 32) / scale).flatten()
    assert float(steps.max()) < 1.001
    assert float((steps > 1e-3).float().mean()) < 0.01


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


class KillAt:
    """A progress that ends the run behind a block."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.plan: Plan | None = None

    def planned(self, plan: Plan) -> None:
        self.plan = plan

    def block_done(self, number: int, report: BlockReport) -> None:
        if number == self.block:
            raise Killed

    def note(self, message: str) -> None:
        pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_interrupted_run_continues_to_the_same_bytes(
    llama: Path, tmp_path: Path, token_lists: Any
) -> None:
    quantize(llama, tmp_path / "whole", SMALL, token_lists)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize(llama, out, SMALL, token_lists, progress=KillAt(0))
    assert not (out / "config.json").exists()
    with pytest.raises(AwqError):
        load_quantized(out)
    again = KillAt(-1)
    quantize(llama, out, SMALL, token_lists, progress=again)
    assert again.plan is not None
    assert again.plan.resumed_at == 1
    assert contents(out) == contents(tmp_path / "whole")


def test_a_run_interrupted_while_publishing_continues(
    llama: Path, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(llama, tmp_path / "whole", SMALL, token_lists, max_shard_bytes=40_000)
    out = tmp_path / "out"

    def die(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr("awq.pipeline.finish.copy_files", die)
    with pytest.raises(Killed):
        quantize(llama, out, SMALL, token_lists, max_shard_bytes=40_000)
    monkeypatch.undo()
    quantize(llama, out, SMALL, token_lists, max_shard_bytes=40_000)
    assert contents(out) == contents(tmp_path / "whole")


def test_unfinished_work_of_other_settings_is_not_mixed(
    llama: Path, tmp_path: Path, token_lists: Any
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize(llama, out, SMALL, token_lists, progress=KillAt(0))
    with pytest.raises(ResumeError, match="calibration"):
        quantize(llama, out, SMALL, token_lists[:-1])
    with pytest.raises(ResumeError, match="group_size"):
        quantize(llama, out, QuantConfig(group_size=64), token_lists)
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ResumeError, match="model"):
        quantize(llama, out, SMALL, token_lists)
    quantize(llama, out, SMALL, token_lists, overwrite=True)
    load_quantized(out)


def test_other_folders_are_not_overwritten(llama: Path, tmp_path: Path, token_lists: Any) -> None:
    out = tmp_path / "out"
    quantize(llama, out, SMALL, token_lists)
    with pytest.raises(OutputExistsError, match="finished checkpoint"):
        quantize(llama, out, SMALL, token_lists)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(OutputExistsError, match=r"diary\.txt"):
        quantize(llama, tmp_path / "mine", SMALL, token_lists)
    with pytest.raises(OutputExistsError, match="own"):
        quantize(llama, llama, SMALL, token_lists, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is a file"):
        quantize(llama, tmp_path / "file", SMALL, token_lists)
    quantize(llama, tmp_path / "mine", SMALL, token_lists, overwrite=True)
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear diary"


def test_a_full_disk_is_an_error_and_leaves_nothing_whole(
    llama: Path, tmp_path: Path, token_lists: Any
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DiskFullError, match="no room"):
            quantize(llama, tmp_path / "out", SMALL, token_lists)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))
    quantize(llama, tmp_path / "out", SMALL, token_lists)


def test_too_little_disk_is_known_beforehand(
    llama: Path, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(DiskFullError, match="free"):
        quantize(llama, tmp_path / "out", SMALL, token_lists)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("calib", [[], [""], ["   \n"], [[]], "no/such/file.txt"])
def test_empty_calibration_is_refused_before_anything_is_written(
    calib: Any, books6m: Path, tmp_path: Path
) -> None:
    with pytest.raises((CalibrationError, AwqError)):
        quantize(books6m, tmp_path / "out", calib=calib)
    assert not (tmp_path / "out").exists()


def test_a_group_size_that_serves_no_layer_is_refused_with_one_that_would(
    llama: Path, tmp_path: Path, token_lists: Any
) -> None:
    with pytest.raises(ConfigError, match="group_size=64 would serve 14 of 14"):
        quantize(llama, tmp_path / "out", QuantConfig(group_size=48), token_lists)
    assert not (tmp_path / "out").exists()


def test_broken_weights_stop_the_run_before_it_starts(llama: Path, tmp_path: Path, token_lists: Any) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.down_proj"):
        quantize(llama, tmp_path / "out", SMALL, token_lists)
    assert not (tmp_path / "out").exists()


def test_token_ids_beyond_the_vocabulary_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="token id 500; the vocabulary ends at 127"):
        quantize(llama, tmp_path / "out", SMALL, [[5, 6, 500]])


def test_smaller_batches_give_the_same_statistics(llama: Path, tmp_path: Path, token_lists: Any) -> None:
    """Padding never counts: batches of one sample and batches of all agree up to rounding."""
    one = quantize(llama, tmp_path / "one", SMALL, token_lists, batch_tokens=1)
    many = quantize(llama, tmp_path / "many", SMALL, token_lists, batch_tokens=100_000)
    for a, b in zip(one.blocks, many.blocks, strict=True):
        assert a.outcome["errors"]["rtn"] == pytest.approx(b.outcome["errors"]["rtn"], rel=1e-3)


@pytest.mark.parametrize(("stage", "place"), [("measure", 3), ("make_judge", 1)])
def test_out_of_memory_halves_the_batches(
    stage: str, place: int, llama: Path, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it happens to the statistics or, behind them, to the search."""
    from awq.pipeline import run

    real, sizes = getattr(run, stage), []

    def short_of_memory(*arguments: Any) -> Any:
        largest = max(batch.hidden.shape[0] * batch.hidden.shape[1] for batch in arguments[place])
        sizes.append(largest)
        if largest > 100:
            raise torch.OutOfMemoryError("pretended")
        return real(*arguments)

    monkeypatch.setattr(run, stage, short_of_memory)
    report = quantize(llama, tmp_path / "out", SMALL, token_lists, batch_tokens=400)
    assert sizes[0] > 100 >= sizes[-1]
    monkeypatch.undo()
    straight = quantize(llama, tmp_path / "straight", SMALL, token_lists, batch_tokens=100)
    for a, b in zip(report.blocks, straight.blocks, strict=True):
        assert a.outcome["errors"]["rtn"] == pytest.approx(b.outcome["errors"]["rtn"], rel=1e-3)

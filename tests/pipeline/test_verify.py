"""The verdict at the end of a run: the figures are those of whole models, and damage on disk is seen."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from awq import QuantConfig
from awq.calibration import HeldOut
from awq.errors import CorruptFileError, EvaluationError, StructureError
from awq.evaluate import compare
from awq.hf import load_float, load_quantized
from awq.model import find_blocks, open_model
from awq.pipeline import quantize, verify
from awq.pipeline.journal import WORK_FOLDER, is_finished
from awq.pipeline.report import BlockReport, Silent
from awq.pipeline.verdict import judge
from awq.pipeline.verify import compare_saved

QUICK = QuantConfig(group_size=32, scale_steps=3, rounding="nearest")
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_SHARED = {
    "num_key_value_heads": 2, "head_dim": 16, "num_kv_shared_layers": 1, "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16, "laurel_rank": 8, "num_hidden_layers": 3, "intermediate_size": 128,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "activation_sparsity_pattern": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "a head of its own": ("llama", _GROUPED),
    "a tied head": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "a capped head": ("gemma2", {**_GROUPED, "head_dim": 16}),
    "masks of two kinds": ("gemma3_text", {**_GROUPED, "head_dim": 16}),
    "experts": ("qwen3_moe", {**_GROUPED, **_EXPERTS}),
    "fused experts": ("granitemoe", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "tuples": ("bloom", {}),
    "transposed weights": ("gpt2", {"n_inner": 128}),
    "a projection behind the blocks": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 32}),
    "states shared by blocks": ("gemma3n_text", _SHARED),
}


def saved(tiny: Any, folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    tiny(family, **changes).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tiny: Any, tmp_path: Path) -> Path:
    return saved(tiny, tmp_path / "model", "llama", num_key_value_heads=2)


def whole(model: Path, out: Path, ids: list[list[int]]) -> Any:
    """The same figures from models that are loaded whole."""
    ours = load_quantized(out, dtype=torch.float32, kernel="torch")
    return compare(
        ours, load_float(model, dtype=torch.float32), [torch.tensor(row) for row in ids], window=128
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_figures_are_those_of_models_loaded_whole(
    name: str, tiny: Any, tmp_path: Path, token_lists: Any
) -> None:
    family, changes = FAMILIES[name]
    model, out = saved(tiny, tmp_path / "model", family, **changes), tmp_path / "out"
    verdict = quantize(model, out, QUICK, token_lists).verdict
    assert verdict is not None
    expected = whole(model, out, token_lists)
    assert verdict.kl > 1e-4  # there is something to be wrong about
    for found, wanted in (
        (verdict.kl, expected.kl),
        (verdict.kl_stderr, expected.kl_stderr),
        (verdict.perplexity, expected.perplexity.value),
        (verdict.original_perplexity, expected.reference_perplexity.value),
        (verdict.rise, expected.rise),
    ):
        assert math.isclose(found, wanted, rel_tol=1e-3, abs_tol=1e-6), (found, wanted)
    assert verdict.top1 == pytest.approx(expected.top1, abs=0.01)
    assert verdict.tokens == expected.tokens


def test_a_head_saved_in_another_dtype_is_judged_as_it_is_saved(
    llama: Path, tmp_path: Path, token_lists: Any
) -> None:
    config = dataclasses.replace(QUICK, dtype="bfloat16")
    verdict = quantize(llama, tmp_path / "out", config, token_lists).verdict
    assert verdict is not None
    expected = whole(llama, tmp_path / "out", token_lists)
    assert verdict.kl == pytest.approx(expected.kl, rel=1e-3)
    assert verdict.perplexity == pytest.approx(expected.perplexity.value, rel=1e-4)


@pytest.mark.parametrize(
    ("layout", "bits"), [("compressed-tensors", 4), ("mlx", 3), ("gptq_v2", 3), ("float", 3)]
)
def test_every_layout_is_read_back(
    layout: Any, bits: int, llama: Path, tmp_path: Path, token_lists: Any
) -> None:
    config = dataclasses.replace(QUICK, format=layout, bits=bits)
    report = quantize(llama, tmp_path / "out", config, token_lists)
    assert report.verdict is not None
    # On the calibration samples, a block's error on disk is the one that the search has found.
    for block, found in zip(report.verdict.blocks, report.blocks, strict=True):
        assert block["error"] == pytest.approx(found.outcome["own_error"], rel=0.2)


def text_of(rows: list[list[int]]) -> HeldOut:
    return HeldOut(tuple(torch.tensor(row) for row in rows if len(row) > 1), "some ids", 128)


def compared(model: Path, out: Path, text: HeldOut) -> verify.Measured:
    skeleton = open_model(model)
    return compare_saved(skeleton, find_blocks(skeleton.model)[0], out, text, torch.device("cpu"))


def test_rows_compared_in_small_pieces_give_the_same_figures(
    llama: Path, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(llama, tmp_path / "out", QUICK, token_lists, verify=False)
    together = compared(llama, tmp_path / "out", text_of(token_lists)).divergence
    most = []
    real = verify.Tail.logits
    monkeypatch.setattr(verify, "_LOGITS", 128 * 16)
    monkeypatch.setattr(verify, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(verify.Tail, "logits", lambda *a: most.append(a[1].numel()) or real(*a))
    pieces = compared(llama, tmp_path / "out", text_of(token_lists)).divergence
    assert together is not None and pieces is not None
    assert max(most) == 16
    assert pieces.kl == pytest.approx(together.kl, rel=1e-5)
    assert pieces.kl_stderr == pytest.approx(together.kl_stderr, rel=1e-4)


def test_one_block_at_a_time_is_in_memory(
    tiny: Any, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tiny, tmp_path / "model", "llama", num_key_value_heads=2, num_hidden_layers=4)
    quantize(model, tmp_path / "out", QUICK, token_lists, verify=False)
    skeleton, held = open_model(model), []

    def real_weights() -> set[str]:
        return {name for name, p in skeleton.model.named_parameters() if not p.is_meta}

    step, logits = verify._Stream.step, verify.Tail.logits

    def stepping(*arguments: Any) -> Any:
        held.append(real_weights())
        return step(*arguments)

    def ending(*arguments: Any) -> Any:
        answer = logits(*arguments)
        held.append(real_weights())
        return answer

    monkeypatch.setattr(verify._Stream, "step", stepping)
    monkeypatch.setattr(verify.Tail, "logits", ending)
    compare_saved(skeleton, "model.layers", tmp_path / "out", text_of(token_lists), torch.device("cpu"))
    for number in range(4):
        for names in held[2 * number : 2 * number + 2]:
            assert names == {n for n, _ in skeleton.model.named_parameters() if f"layers.{number}." in n}
    assert held[8:] and all(names == {"model.norm.weight", "lm_head.weight"} for names in held[8:])
    assert real_weights() == set()


def test_the_report_holds_the_verdict_unless_it_is_not_wanted(
    llama: Path, tmp_path: Path, token_lists: Any
) -> None:
    report = quantize(llama, tmp_path / "with", QUICK, token_lists)
    beside = json.loads((tmp_path / "with" / "awq_report.json").read_text())
    assert report.verdict is not None
    assert beside["verdict"]["kl"] == report.verdict.kl
    assert beside["verdict"]["text"] == report.verdict.text
    assert [block["name"] for block in beside["verdict"]["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert report.seconds["verify"] > 0

    report = quantize(llama, tmp_path / "without", QUICK, token_lists, verify=False)
    assert report.verdict is None
    assert "verify" not in report.seconds
    assert json.loads((tmp_path / "without" / "awq_report.json").read_text())["verdict"] is None
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


def damage(out: Path, key: str, change: Any) -> None:
    tensors = load_file(out / "model.safetensors")
    tensors[key] = change(tensors[key])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def damaged_before_the_verdict(monkeypatch: pytest.MonkeyPatch, key: str, change: Any) -> None:
    """What is written is damaged as soon as it is complete."""
    from awq.pipeline import run

    real = run.finish

    def finish(*arguments: Any) -> None:
        real(*arguments)
        damage(arguments[4], key, change)

    monkeypatch.setattr(run, "finish", finish)


def test_a_damaged_block_is_named(
    llama: Path, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "model.layers.1.mlp.down_proj.qweight"
    damaged_before_the_verdict(monkeypatch, key, lambda codes: codes ^ 0x55555555)
    verdict = quantize(llama, tmp_path / "out", QUICK, token_lists).verdict
    assert verdict is not None
    assert verdict.grade == "poor"
    assert verdict.sentence.startswith("Look at these layers: model.layers.1 with an error of ")
    assert "What is saved of model.layers.1 is much worse than what the search had found" in verdict.sentence
    assert verdict.blocks[1]["error"] > 10 * verdict.blocks[0]["error"]


@pytest.mark.parametrize(
    ("key", "where"),
    [("model.layers.1.mlp.down_proj.scales", "model.layers.1"), ("lm_head.weight", "the output layer")],
)
def test_not_a_number_on_disk_is_an_error_and_in_the_report(
    key: str, where: str, llama: Path, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    damaged_before_the_verdict(monkeypatch, key, lambda tensor: tensor * float("nan"))
    with pytest.raises(EvaluationError, match=f"Broken: .* gives NaN or infinity in {where}"):
        quantize(llama, out, QUICK, token_lists)
    verdict = json.loads((out / "awq_report.json").read_text())["verdict"]
    assert verdict["grade"] == "broken"
    assert verdict["kl"] is None
    assert is_finished(out)  # to look at; a second run would give the same


def test_a_tensor_that_is_gone_is_an_error(llama: Path, tmp_path: Path, token_lists: Any) -> None:
    out = tmp_path / "out"
    quantize(llama, out, QUICK, token_lists, verify=False)
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"lacks model\.layers\.1\.input_layernorm.weight"):
        compared(llama, out, text_of(token_lists))


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


class Blocks(Silent):
    """Remembers which blocks were done."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def block_done(self, number: int, report: BlockReport) -> None:
        self.done.append(number)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_killed_in_its_verdict_has_made_a_checkpoint_and_goes_on_there(
    llama: Path, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(llama, tmp_path / "unbroken", QUICK, token_lists)
    out, again = tmp_path / "out", Blocks()

    def killed(*arguments: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("awq.pipeline.verdict.compare_saved", killed)
        with pytest.raises(Killed):
            quantize(llama, out, QUICK, token_lists)
    assert not is_finished(out)
    assert (out / WORK_FOLDER).exists()
    load_quantized(out)
    quantize(llama, out, QUICK, token_lists, progress=again)
    assert again.done == []
    assert contents(out) == contents(tmp_path / "unbroken")


def test_a_verdict_that_was_broken_off_may_be_left_out(
    llama: Path, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed(*arguments: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("awq.pipeline.verdict.compare_saved", killed)
        with pytest.raises(Killed):
            quantize(llama, out, QUICK, token_lists)
    assert quantize(llama, out, QUICK, token_lists, verify=False).verdict is None
    assert is_finished(out)


def test_a_model_that_cannot_be_compared_is_quantized_all_the_same(
    llama: Path, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> Any:
        raise StructureError("it cannot be run")

    monkeypatch.setattr("awq.pipeline.verdict.compare_saved", refused)
    verdict = quantize(llama, tmp_path / "out", QUICK, token_lists).verdict
    assert verdict is not None
    assert verdict.grade == "unknown"
    assert verdict.sentence == "Not compared with the original: it cannot be run."
    assert is_finished(tmp_path / "out")


def measured(kl: float, rise: float, stderr: float = 0.0) -> verify.Measured:
    """Figures as they might be found, on a real comparison's frame."""
    from awq.evaluate import Divergence, Perplexity

    def perplexity(nll: float) -> Perplexity:
        return Perplexity(math.exp(nll), 0.0, nll, 0.0, 16, 256, 256, 4080)

    found = Divergence(kl, 0.0, 0.9, 0.0, perplexity(3.0 + rise), perplexity(3.0), 4080, rise, stderr)
    return verify.Measured(found, [{"name": f"layers.{i}", "error": 0.1 * i, "drift": 0.1} for i in range(5)])


REPORTS = [
    BlockReport(
        f"layers.{i}",
        {},
        {"own_error": 0.09 * i, "layers": {"a": {"rtn": 0.3, "awq": 0.1 * i}, "b": {"rtn": 0.05}}},
    )
    for i in range(5)
]


@pytest.mark.parametrize(
    ("kl", "rise", "stderr", "grade"),
    [
        (0.002, 0.001, 0.0, "excellent"),
        (0.0101, 0.001, 0.0, "good"),
        (0.002, 0.02, 0.0, "good"),
        (0.002, 0.02, 0.006, "excellent"),  # within the noise
        (0.002, -0.5, 0.0, "excellent"),
        (0.051, 0.0, 0.0, "poor"),
        (0.002, 0.06, 0.001, "poor"),
        (0.002, 0.001, math.nan, "excellent"),  # a single window
    ],
)
def test_grades_follow_divergence_and_the_rise_of_perplexity(
    kl: float, rise: float, stderr: float, grade: str
) -> None:
    verdict = judge(measured(kl, rise, stderr), text_of([[1, 2]]), REPORTS, QuantConfig(), 128)
    assert verdict.grade == grade
    assert f"{kl:.4f}" in verdict.sentence


def test_a_poor_verdict_names_the_worst_blocks_and_layers_and_what_helps() -> None:
    sentence = judge(measured(0.3, 0.2), text_of([[1, 2]]), REPORTS, QuantConfig(), 16).sentence
    assert sentence.startswith(
        "Look at these layers: layers.4 with an error of 40.0% (a 40.0%, b 5.0%); layers.3"
    )
    assert "layers.1 " not in sentence
    assert sentence.endswith(
        "What helps: smaller groups (--group-size 64), --preset best, more calibration samples "
        "(--samples 128) or leaving those layers float (--skip NAME)."
    )


def test_memory_goes_back_to_the_system_after_each_block(
    llama: Path, tmp_path: Path, token_lists: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the heap grows with the model's depth, a third of a block for each (`benchmarks/memory.py`)."""
    blocks: list[int] = []
    monkeypatch.setattr(verify, "give_back", lambda: blocks.append(1))
    assert quantize(llama, tmp_path / "out", QUICK, token_lists).verdict is not None
    assert len(blocks) == 2

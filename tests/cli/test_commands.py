"""What each command does and tells, for people and as JSON."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import awq as package

SMALL = ("--group-size", 32, "--samples", 4, "--seq-len", 32)


def test_quantize_makes_a_checkpoint_and_tells_its_plan_and_its_outcome(
    awq: Any, original: Path, tmp_path: Path
) -> None:
    done = awq("quantize", original, tmp_path / "out", *SMALL)
    assert done.code == 0, done.err
    for told in (
        "LlamaForCausalLM, 2 blocks",
        "4 samples of up to 32 tokens, 128 tokens in all, from the bundled books",
        "14 linear layers",
        "lm_head: outside the decoder blocks",
        "peak memory",
        "while working",
        "of plain rounding's",
        "KL divergence from the original 0.",
        "tokens, on excerpts of the bundled held-out books.",
        "awq_report.json",
    ):
        assert told in done.out, told
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"] == 4
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_quantize_options_reach_the_checkpoint(awq: Any, original: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text("[5, 6, 7]\n[8]\n")
    done = awq(
        "quantize", original, tmp_path / "out", "--group-size", 64, "--calib", tmp_path / "ids.jsonl",
        "--skip", "down_proj", "--skip", "layers.1.", "--dtype", "bfloat16", "--method", "rtn", "--no-clip",
        "--batch-tokens", 2, "--no-verify", "--json", "-",
    )  # fmt: skip
    assert done.code == 0, done.err
    report = done.json
    assert report["verdict"] is None
    assert report["config"]["method"] == "rtn"
    assert report["config"]["clip"] is False
    assert "4 tokens in all" in report["plan"]["calibration"]
    assert report["plan"]["batch_tokens"] == 2
    assert len(report["plan"]["quantized"]) == 6
    assert all("layers.0." in name and "down_proj" not in name for name in report["plan"]["quantized"])
    scales = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.scales"]
    assert scales.dtype == torch.bfloat16
    assert scales.shape == (1, 128)


def test_layout_width_symmetry_and_budget_reach_the_checkpoint(
    awq: Any, original: Path, tmp_path: Path
) -> None:
    options = ("--format", "compressed-tensors", "--symmetric", "--target-bits", "6")
    done = awq("quantize", original, tmp_path / "out", *SMALL, *options)
    assert done.code == 0, done.err
    assert "bits of a weight" in done.out
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "compressed-tensors"
    assert all(group["weights"]["symmetric"] for group in entry["config_groups"].values())
    assert len(entry["config_groups"]) > 1
    refused = awq("quantize", original, tmp_path / "other", "--bits", "3", "--format", "gemm")
    assert refused.code != 0
    assert "3 bits fit into" in refused.err


def test_the_report_with_its_timings_goes_to_a_file_or_to_the_output(
    awq: Any, original: Path, tmp_path: Path
) -> None:
    done = awq(
        "quantize", original, tmp_path / "out", *SMALL, "--json", "-", "--report", tmp_path / "out" / "r.json"
    )
    assert done.code == 0, done.err
    report = done.json
    assert report == json.loads((tmp_path / "out" / "r.json").read_text())
    assert report["seconds"]["total"] > 0
    assert report["peak_bytes"] > 0
    for block in report["blocks"]:
        assert block["error"] <= block["errors"]["rtn"]
        assert block["seconds"]["search"] > 0
    assert report["verdict"]["sentence"] in done.err  # people read on, on the other stream
    beside = json.loads((tmp_path / "out" / "awq_report.json").read_text())
    assert "seconds" not in beside
    assert [block["name"] for block in beside["blocks"]] == ["model.layers.0", "model.layers.1"]


def test_overwrite_replaces_a_checkpoint(awq: Any, original: Path, tmp_path: Path) -> None:
    assert awq("quantize", original, tmp_path / "out", *SMALL).code == 0
    refused = awq("quantize", original, tmp_path / "out", *SMALL)
    assert refused.code == 1
    assert "holds a finished checkpoint" in refused.err
    assert awq("quantize", original, tmp_path / "out", *SMALL, "--method", "rtn", "--overwrite").code == 0
    report = json.loads((tmp_path / "out" / "awq_report.json").read_text())
    assert report["config"]["method"] == "rtn"


def test_eval_prints_perplexity_with_its_definition(awq: Any, original: Path) -> None:
    done = awq("eval", original, "--window", 64, "--max-tokens", 640)
    assert done.code == 0, done.err
    assert "exp(mean negative log-likelihood) over 10 windows of up to 64 tokens, stride 64, 630" in done.out
    assert "KL" not in done.out


def test_eval_figures_are_those_of_the_library(awq: Any, original: Path, quantized: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from awq.evaluate import compare, token_ids
    from awq.hf import load_quantized

    options = ("--window", 64, "--stride", 32, "--max-tokens", 640, "--batch-size", 3)
    done = awq("eval", quantized, "--against", original, *options, "--json", "-")
    assert done.code == 0, done.err
    figures = done.json
    ids = token_ids("bundled", AutoTokenizer.from_pretrained(original))
    expected = compare(
        load_quantized(quantized, dtype=torch.float32, kernel="torch"),
        AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32),
        ids, window=64, stride=32, max_tokens=640,
    )  # fmt: skip
    assert figures["kl"] == pytest.approx(expected.kl, rel=1e-4)
    assert figures["kl_stderr"] == pytest.approx(expected.kl_stderr, rel=1e-3)
    assert figures["top1"] == pytest.approx(expected.top1)
    assert figures["perplexity"]["value"] == pytest.approx(expected.perplexity.value, rel=1e-4)
    assert figures["reference_perplexity"]["value"] == pytest.approx(
        expected.reference_perplexity.value, rel=1e-4
    )
    assert figures["kl"] > 0
    assert figures["tokens"] == 64 - 1 + 18 * 32
    for told in ("KL divergence (nats)", "top-1 agreement", "perplexity of the original"):
        assert told in done.err


def test_eval_of_one_window_says_null_where_there_is_no_standard_error(
    awq: Any, original: Path, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    done = awq("eval", original, "--window", 64, "--max-tokens", 64, "--json", file)
    assert done.code == 0, done.err
    figures = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert figures["perplexity"]["stderr"] is None
    assert figures["perplexity"]["windows"] == 1


def test_eval_of_documents_takes_each_by_itself(awq: Any, original: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": text}) for text in ("The sea was calm.", "x", "And so on."))
    )
    done = awq("eval", original, "--text", file, "--documents", "--json", "-")
    assert done.code == 0, done.err
    assert done.json["perplexity"]["windows"] == 2  # one token predicts nothing


def test_generate_streams_the_text_and_times_it(
    awq: Any, original: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = awq("generate", quantized, "--prompt", "The captain", "--max-new-tokens", 5)
    assert done.code == 0, done.err
    assert done.out.startswith("The captain")
    assert "tokens/s" in done.err
    assert "tokens/s" not in done.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("The captain"))
    assert awq("generate", quantized, "--prompt", "-", "--max-new-tokens", 5).out == done.out
    assert awq("generate", original, "--prompt", "The captain", "--max-new-tokens", 5).code == 0


def test_words_come_before_the_last_one_is_known(
    awq: Any, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TextStreamer

    seen: list[str] = []
    real = TextStreamer.on_finalized_text

    def note(self: Any, text: str, stream_end: bool = False) -> None:
        seen.append(text)
        real(self, text, stream_end)

    monkeypatch.setattr(TextStreamer, "on_finalized_text", note)
    done = awq("generate", quantized, "--prompt", "The captain looked at", "--max-new-tokens", 24)
    assert len([text for text in seen if text]) > 3
    assert "".join(seen).strip() == done.out.strip()


def test_sampling_is_repeatable_with_a_seed(awq: Any, quantized: Path) -> None:
    options = ("--prompt", "The", "--max-new-tokens", 12, "--temperature", 2.0, "--top-p", 0.99)
    one, two, other = (awq("generate", quantized, *options, "--seed", seed) for seed in (1, 1, 2))
    assert one.out == two.out != other.out


def test_generation_stops_where_the_context_ends_and_says_so(awq: Any, quantized: Path) -> None:
    done = awq("generate", quantized, "--prompt", "The captain " * 20, "--max-new-tokens", 1000)
    assert done.code == 0, done.err
    assert "room for" in done.err


def test_inspect_tells_what_a_checkpoint_holds(awq: Any, quantized: Path) -> None:
    done = awq("inspect", quantized, "--json", "-")
    assert done.code == 0, done.err
    facts = done.json
    assert (facts["layout"], facts["bits"], facts["group_sizes"]) == ("gemm", 4, [32])
    assert facts["quantized_layers"] == 14
    assert facts["left_float"] == ["lm_head"]
    # q and o 64x64, k and v 32x64, gate, up and down 64x128, in two blocks.
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert facts["quantized_weights"] == weights
    # Four bits, and a 16-bit scale and a 4-bit zero for each 32.
    assert facts["bits_per_quantized_weight"] == pytest.approx(4 + 20 / 32)
    tensors = load_file(quantized / "model.safetensors").values()
    assert facts["bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert "bits per quantized weight" in done.err
    assert "4.625" in done.err
    assert facts["engines"]["LMDeploy TurboMind"] == "no: it takes groups of 128"
    assert facts["engines"]["mlx-lm"] == "fits"
    assert facts["tensor_parallel"] == [2]  # o_proj has two groups
    assert "mlx-lm" in done.err


def test_inspect_tells_what_would_become_of_a_float_model(awq: Any, original: Path) -> None:
    done = awq("inspect", original, "--group-size", 32)
    assert done.code == 0, done.err
    assert "2 blocks in model.layers" in done.out
    lines = [line.strip(" │├└─") for line in done.out.splitlines()]
    place = next(i for i, line in enumerate(lines) if line.startswith("input_layernorm scales 64 channels"))
    assert ": proved to" in lines[place]
    assert lines[place + 1 : place + 4] == [
        "self_attn.q_proj  64 x 64",
        "self_attn.k_proj  32 x 64",
        "self_attn.v_proj  32 x 64",
    ]
    assert lines[-2:] == ["outside the blocks, stays float", "lm_head"]
    figures = awq("inspect", original, "--group-size", 128, "--json", "-").json
    (kind,) = figures["kinds"]
    assert kind["blocks"] == [0, 1]
    assert kind["layers"] == ["mlp.down_proj"]  # the only one with 128 inputs
    assert "64 input channels do not divide" in kind["skipped"]["self_attn.q_proj"]


def test_convert_and_export_write_other_layouts_and_tell_what_they_did(
    awq: Any, quantized: Path, tmp_path: Path
) -> None:
    done = awq("convert", quantized, tmp_path / "gptq", "--to", "gptq", "--json", "-")
    assert done.code == 0, done.err
    assert (done.json["source"], done.json["target"], done.json["layers"]) == ("gemm", "gptq", 14)
    assert "14 layers from gemm to gptq" in done.err
    done = awq("export", quantized, tmp_path / "fp16", "--to", "fp16")
    assert done.code == 0, done.err
    assert "14 layers from gemm" in done.out
    assert "quantization_config" not in json.loads((tmp_path / "fp16" / "config.json").read_text())
    back = awq("convert", tmp_path / "gptq", tmp_path / "gemm", "--to", "gemm")
    assert back.code == 0, back.err
    one, two = (load_file(folder / "model.safetensors") for folder in (quantized, tmp_path / "gemm"))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_demo_compares_both_methods_with_the_original(awq: Any, tmp_path: Path) -> None:
    done = awq(
        "demo", "--samples", 2, "--windows", 2, "--out", tmp_path / "demo", "--json", tmp_path / "j.json"
    )
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "j.json").read_text())
    assert list(rows) == ["original", "plain rounding", "AWQ"]
    assert rows["original"]["kl"] == 0
    assert rows["AWQ"]["kl"] > 0
    assert rows["AWQ"]["bytes"] == rows["plain rounding"]["bytes"] < rows["original"]["bytes"]
    for row in rows.values():
        assert row["text"].startswith("The captain looked at the sea and ")
        assert row["tokens_per_second"] > 0
    for folder in ("rtn", "awq"):
        assert (tmp_path / "demo" / folder / "config.json").exists()
    assert "KL to the original" in done.out
    for name, row in rows.items():
        assert f"{name}: {row['text']}" in done.out
    other = awq("demo", "--samples", 1, "--windows", 2, "--out", tmp_path / "demo")
    assert other.code == 1
    assert "rtn holds a finished checkpoint" in other.err


def test_folders_with_brackets_in_their_names_are_no_markup(awq: Any, original: Path, tmp_path: Path) -> None:
    strange = shutil.copytree(original, tmp_path / "[bold]m[/x]")
    done = awq("quantize", strange, tmp_path / "[out[/]", *SMALL)
    assert done.code == 0, done.err
    assert f"Opening {strange}" in done.out
    for command in (("inspect", strange), ("eval", strange, "--window", 8, "--max-tokens", 8)):
        done = awq(*command)
        assert done.code == 0, done.err
        assert "[bold]m[/x]" in done.out.replace("\n", "")
    missing = awq("inspect", "/no/[/such]/[red]folder")
    assert missing.code == 1
    assert "/no/[/such]/[red]folder" in missing.err


def test_the_version_and_the_help_are_told(awq: Any) -> None:
    assert awq("--version").out == f"openawq {package.__version__}\n"
    for command in ("quantize", "eval", "generate", "inspect", "convert", "export", "demo"):
        assert command in awq("--help").out
        assert awq(command, "--help").code == 0


def test_a_fused_model_continues_with_the_same_words(awq: Any, quantized: Path) -> None:
    options = ("--prompt", "The sea", "--max-new-tokens", 8, "--dtype", "float32")
    plain, fused = awq("generate", quantized, *options), awq("generate", quantized, *options, "--fuse")
    assert fused.code == 0, fused.err
    assert fused.out == plain.out


def test_a_rounded_head_can_be_judged_and_used(awq: Any, quantized: Path) -> None:
    options = ("--window", 64, "--max-tokens", 640, "--json", "-")
    done = awq("eval", quantized, "--against", quantized, "--head-bits", 8, *options)
    assert done.code == 0, done.err
    assert 0 < done.json["kl"] < 1e-3
    done = awq("generate", quantized, "--prompt", "The sea", "--max-new-tokens", 3, "--head-bits", 8)
    assert done.code == 0, done.err

"""Bad input: one line that says what, where and the cure; an exit code; no traceback; nothing left behind."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

SMALL = ("--group-size", 32, "--samples", 4, "--seq-len", 32)


def refused(result: Any, *parts: str) -> None:
    """Exit code 1, nothing on the output but what was printed before, one line with these parts."""
    assert result.code == 1, (result.out, result.err)
    assert "Traceback" not in result.err + result.out
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in line, line


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", 3), "bits=3: the 'gemm' format holds 4 bits"),
        (("--bits", 16, "--format", "float"), "bits=16"),
        (("--group-size", 0), "group_size=0"),
        (("--group-size", 100), "group_size=100 is not possible; use a multiple of 8"),
        (("--group-size", 256), "serves no layer of this model; group_size=64 would serve 14 of 14"),
        (("--format", "gguf"), "format='gguf' is unknown; choose one of: gemm"),
        (("--method", "magic"), "method='magic' is unknown; choose one of: awq, rtn"),
        (("--rounding", "up"), "rounding='up' is unknown"),
        (("--dtype", "int8"), "dtype='int8' is unknown"),
        (("--dtype", "float32"), "stores 16-bit scales"),
        (("--device", "gpu"), "device 'gpu' cannot be used here"),
        (("--samples", 0), "samples=0"),
        (("--seq-len", -1), "seq_len=-1"),
        (("--batch-tokens", 0), "batch_tokens=0 must be at least 1"),
        (("--skip", "proj"), "named in modules_to_not_convert"),
        (("--skip", ""), "modules_to_not_convert"),
        (("--calib", "no-such-source"), "'no-such-source' is no file"),
        (("--calib", "no/such/file.txt"), "no/such/file.txt does not exist"),
        (("--report", "no/such/folder/r.json"), "cannot write no/such/folder/r.json: no such folder"),
        (("--json", "."), "cannot write .: it is a folder"),
    ],
)
def test_quantize_refuses_before_anything_is_written(
    options: tuple[Any, ...], message: str, awq: Any, original: Path, tmp_path: Path
) -> None:
    refused(awq("quantize", original, tmp_path / "out", *SMALL, *options), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_calibration_text_is_refused(content: str, awq: Any, original: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(content)
    refused(
        awq("quantize", original, tmp_path / "out", "--calib", tmp_path / "empty.txt"),
        "empty.txt holds no text",
    )
    assert not (tmp_path / "out").exists()


def test_missing_models_are_refused_by_every_command(awq: Any, tmp_path: Path) -> None:
    for arguments in (
        ("quantize", "no-such-model", tmp_path / "out"),
        ("eval", "no-such-model"),
        ("generate", "no-such-model", "--prompt", "x"),
        ("inspect", "no-such-model"),
        ("convert", "no-such-model", tmp_path / "out", "--to", "gptq"),
        ("export", "no-such-model", tmp_path / "out", "--to", "mlx"),
    ):
        refused(awq(*arguments), "no-such-model is neither a folder nor the name of a model on the hub")
    (tmp_path / "empty").mkdir()
    for arguments in (("quantize", tmp_path / "empty", tmp_path / "out"), ("inspect", tmp_path / "empty")):
        refused(awq(*arguments), "config.json does not exist")


def commands_on(model: Path, tmp_path: Path) -> list[tuple[Any, ...]]:
    return [
        ("quantize", model, tmp_path / "out", *SMALL),
        ("eval", model, "--window", 16, "--max-tokens", 32),
        ("generate", model, "--prompt", "x", "--max-new-tokens", 1),
        ("inspect", model, "--group-size", 32),
    ]


def test_truncated_weights_are_refused_by_every_command(awq: Any, model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 5)
    for arguments in commands_on(model, tmp_path):
        refused(awq(*arguments), "model.safetensors is truncated", "fetch it again")
    assert not (tmp_path / "out").exists()


def test_a_truncated_or_missing_shard_is_refused_by_every_command(
    awq: Any, tiny: Any, original: Path, tmp_path: Path
) -> None:
    model = tmp_path / "sharded"
    tiny("llama", num_key_value_heads=2, vocab_size=4096).save_pretrained(model, max_shard_size="100KB")
    shutil.copy(original / "tokenizer.json", model)
    shutil.copy(original / "tokenizer_config.json", model)
    shard = sorted(model.glob("*.safetensors"))[-1]
    os.truncate(shard, 100)
    for arguments in commands_on(model, tmp_path):
        refused(awq(*arguments), shard.name)
    shard.unlink()
    for arguments in commands_on(model, tmp_path):
        refused(awq(*arguments), f"lacks {shard.name}")


def test_broken_configurations_are_refused_by_every_command(awq: Any, model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text("{")
    for arguments in commands_on(model, tmp_path):
        refused(awq(*arguments), "config.json is not readable JSON")
    (model / "config.json").write_text('{"model_type": "no_such_model"}')
    for arguments in commands_on(model, tmp_path):
        refused(awq(*arguments), "no_such_model")


def test_a_missing_weight_is_refused_by_every_command(awq: Any, model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for arguments in commands_on(model, tmp_path):
        refused(awq(*arguments), "lacks", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused_by_name(value: float, awq: Any, model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(
        awq("quantize", model, tmp_path / "out", *SMALL),
        "NaN or infinity",
        "model.layers.0.self_attn.q_proj.weight",
    )
    assert not (tmp_path / "out").exists()
    refused(awq("eval", model, "--window", 16, "--max-tokens", 32), "gives NaN or infinite logits")


def test_a_quantized_model_is_not_quantized_again(awq: Any, quantized: Path, tmp_path: Path) -> None:
    refused(awq("quantize", quantized, tmp_path / "out", *SMALL), "is quantized already (awq)")
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else_are_left_alone(awq: Any, original: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    refused(awq("quantize", original, tmp_path / "mine", *SMALL), "mine holds other files (diary.txt")
    refused(awq("quantize", original, original, *SMALL), "the output folder is the model's own")
    (tmp_path / "file").write_text("")
    refused(awq("quantize", original, tmp_path / "file", *SMALL), "file is a file")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_whole(
    awq: Any, original: Path, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        result = awq("quantize", original, tmp_path / "out", *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(result, "no room for", "run the same command again")
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert awq("quantize", original, tmp_path / "out", *SMALL).code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "no.txt"), "no.txt does not exist"),
        (("--window", 1), "window=1 must be at least 2"),
        (("--window", 16, "--stride", 0), "stride=0"),
        (("--window", 16, "--stride", 17), "stride=17"),
        (("--max-tokens", 0), "--max-tokens must be at least 1"),
        (("--max-tokens", 10), "10 tokens, fewer than one window of 128"),
        (("--batch-size", 0), "--batch-size"),
        (("--dtype", "int8"), "dtype 'int8' is unknown"),
        (("--device", "gpu"), "device 'gpu'"),
        (("--against", "no-such-model"), "no-such-model is neither"),
        (("--json", "no/such/folder.json"), "no such folder"),
    ],
)
def test_eval_refuses_what_has_no_meaning(
    options: tuple[Any, ...], message: str, awq: Any, original: Path
) -> None:
    refused(awq("eval", original, *options), message)


def test_eval_refuses_models_of_different_vocabularies(
    awq: Any, original: Path, books6m: Path, tiny: Any, tmp_path: Path
) -> None:
    tiny("llama", num_key_value_heads=2, vocab_size=4000).save_pretrained(tmp_path / "other")
    refused(awq("eval", original, "--against", tmp_path / "other", "--window", 16), "different vocabularies")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "x", "--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
        (("--prompt", "x", "--temperature", -1), "--temperature at least 0"),
        (("--prompt", "x", "--top-p", 0), "--top-p in (0, 1]"),
        (("--prompt", "x", "--chat"), "no chat template; leave --chat out"),
        (("--prompt", "x " * 500), "the model's context ends at 128"),
        (("--prompt", "x", "--dtype", "int8"), "dtype 'int8' is unknown"),
    ],
)
def test_generate_refuses_what_has_no_meaning(
    options: tuple[Any, ...], message: str, awq: Any, quantized: Path
) -> None:
    refused(awq("generate", quantized, *options), message)


def test_damaged_checkpoints_are_refused_when_loaded_and_when_inspected(
    awq: Any, quantized: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(quantized, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    refused(awq("inspect", broken), "model.layers.0.mlp.up_proj", "scales")
    refused(awq("generate", broken, "--prompt", "x"), "model.layers.0.mlp.up_proj")
    refused(awq("eval", broken), "model.layers.0.mlp.up_proj")


def test_a_folder_without_a_tokenizer_says_so(awq: Any, model: Path, tmp_path: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    refused(awq("quantize", model, tmp_path / "out", *SMALL), "has no tokenizer that can be loaded")
    refused(awq("generate", model, "--prompt", "x"), "has no tokenizer that can be loaded")
    refused(awq("eval", model), "has no tokenizer that can be loaded")


@pytest.mark.parametrize(
    ("command", "target", "message"),
    [
        ("convert", "no_such_layout", "no_such_layout"),
        ("export", "no_such_engine", "no_such_engine"),
        ("convert", "gemm", "gemm"),
    ],
)
def test_conversions_without_meaning_are_refused(
    command: str, target: str, message: str, awq: Any, quantized: Path, original: Path, tmp_path: Path
) -> None:
    refused(awq(command, quantized, tmp_path / "out", "--to", target), message)
    refused(awq(command, original, tmp_path / "out", "--to", target))
    assert not (tmp_path / "out").exists()


def test_conversions_leave_other_folders_alone(awq: Any, quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    refused(awq("convert", quantized, tmp_path / "mine", "--to", "gptq"), "mine holds other files")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


@pytest.mark.parametrize(
    "arguments", [("demo", "--samples", 0), ("demo", "--windows", 1), ("demo", "--json", ".")]
)
def test_demo_refuses_what_has_no_meaning(arguments: tuple[Any, ...], awq: Any) -> None:
    refused(awq(*arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantise",),
        ("quantize",),
        ("quantize", "a", "b", "--bits", "four"),
        ("eval", "a", "--no-such-option"),
    ],
)
def test_a_command_line_that_cannot_be_read_exits_with_two(arguments: tuple[str, ...], awq: Any) -> None:
    result = awq(*arguments)
    assert result.code == 2
    assert "Usage" in result.err
    assert "Traceback" not in result.err


def test_a_traceback_can_be_asked_for(awq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from awq.errors import MissingFileError

    monkeypatch.setenv("AWQ_DEBUG", "1")
    with pytest.raises(MissingFileError):
        awq("inspect", "no-such-model")


def test_errors_of_many_lines_are_told_in_one(awq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from awq.errors import StructureError

    def fail(*_: Any) -> None:
        raise StructureError("first line\n  second [line]")

    monkeypatch.setattr("awq.model.fetch.resolve", fail)
    result = awq("inspect", "anything")
    assert result.err == "error: first line second [line]\n"


def test_an_interruption_says_that_the_work_goes_on(
    awq: Any, original: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("awq.pipeline.quantize", interrupt)
    result = awq("quantize", original, tmp_path / "out")
    assert result.code == 130
    assert "continues when the same command is run again" in result.err


def test_an_interruption_that_a_library_turns_into_its_own_error_is_one_all_the_same(
    awq: Any, original: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def swallow(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object") from None

    monkeypatch.setattr("awq.pipeline.quantize", swallow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = awq("quantize", original, tmp_path / "out")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.code == 130
    assert "continues when the same command is run again" in result.err
    assert "shape of object" not in result.err

"""From layout to layout: what is kept, what is refused, what is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import awq
from awq import QuantConfig
from awq.cli.main import app
from awq.errors import AwqError, ConfigError, CorruptFileError, OutputExistsError, WeightError
from awq.formats import LAYOUTS
from awq.formats.stream import pack_stream
from awq.model.quantized import QuantizedCheckpoint
from awq.pipeline.convert import TARGETS
from awq.pipeline.journal import WORK_FOLDER
from awq.pipeline.writer import ShardWriter
from awq.weight import QuantizedWeight


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Path:
    """A tiny Llama in the GEMM layout, with a float layer, a bias, a stray tensor and stray files."""
    folder = tmp_path_factory.mktemp("convert")
    model = tiny("llama", num_key_value_heads=2, attention_bias=True, hidden_size=128)
    model.to(torch.bfloat16).save_pretrained(folder / "float")
    tensors = load_file(folder / "float" / "model.safetensors")
    tensors["mtp.head.weight"] = torch.arange(6, dtype=torch.float64).view(2, 3)
    save_file(tensors, folder / "float" / "model.safetensors", {"format": "pt"})
    ids = [torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(i)).tolist() for i in (0, 1)]
    config = QuantConfig(group_size=64, method="rtn", modules_to_not_convert=("layers.1.mlp.down_proj",))
    awq.quantize(folder / "float", folder / "gemm", config, ids)
    (folder / "gemm" / "extra").mkdir()
    (folder / "gemm" / "extra" / "template.jinja").write_text("{{ kept }}")
    # An older project's file, which would contradict the new configuration.
    (folder / "gemm" / "quant_config.json").write_text('{"w_bit": 4}')
    # No zero point is 0, so that every target can hold it.
    _edit(folder / "gemm", lambda weight: weight.zeros.clamp_(min=1))
    return folder / "gemm"


def _edit(folder: Path, change: Any) -> None:
    """Change the weights of every layer of a GEMM checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        weight = LAYOUTS["gemm"].unpack({s: tensors[f"{name}.{s}"] for s in LAYOUTS["gemm"].names})
        change(weight)
        tensors |= {f"{name}.{s}": tensor for s, tensor in LAYOUTS["gemm"].pack(weight).items()}
    unused = {"format": "pt", "openawq.unused": "mtp.head.weight"}
    save_file(tensors, folder / "model.safetensors", unused)


def read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# Those that hold any 4-bit weight.
WITH_ZEROS = [name for name in TARGETS if name != "marlin"]


@pytest.mark.parametrize("target", [name for name in WITH_ZEROS if name not in ("gemm", "mlx")])
def test_there_and_back_gives_the_same_tensors_and_configuration(
    target: str, source: Path, tmp_path: Path
) -> None:
    result = awq.convert(source, tmp_path / "there", target)
    assert (result.source, result.target, result.layers) == ("gemm", target, 13)
    there = QuantizedCheckpoint(tmp_path / "there")
    assert there.detected.layout == target
    awq.convert(tmp_path / "there", tmp_path / "back", "gemm")
    before, after = read(source), read(tmp_path / "back")
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert config_of(tmp_path / "back") == config_of(source)


@pytest.mark.parametrize("other", ["gemv_fast", "gptq_v2", "compressed-tensors"])
def test_any_layout_converts_to_any_other(other: str, source: Path, tmp_path: Path) -> None:
    awq.convert(source, tmp_path / "one", other)
    for target in WITH_ZEROS:
        if target == other:
            continue
        awq.convert(tmp_path / "one", tmp_path / target, target)
        ours, theirs = QuantizedCheckpoint(source), QuantizedCheckpoint(tmp_path / target)
        for name in ours.layers:
            first, second = ours.weight(name), theirs.weight(name)
            assert torch.equal(first.codes, second.codes)
            assert torch.equal(first.scales, second.scales)
            assert torch.equal(first.zeros, second.zeros)


def test_symmetric_codes_go_to_marlin_and_back_and_others_are_refused_with_the_layer(
    source: Path, tmp_path: Path
) -> None:
    symmetric = tmp_path / "symmetric"
    shutil.copytree(source, symmetric)
    _edit(symmetric, lambda weight: weight.zeros.fill_(8))
    awq.convert(symmetric, tmp_path / "marlin", "marlin")
    entry = config_of(tmp_path / "marlin")["quantization_config"]
    assert (entry["version"], entry["zero_point"]) == ("marlin", False)
    assert not [name for name in read(tmp_path / "marlin") if name.endswith("qzeros")]
    awq.convert(tmp_path / "marlin", tmp_path / "back", "gemm")
    before, after = read(symmetric), read(tmp_path / "back")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert config_of(tmp_path / "back") == config_of(source)
    with pytest.raises(ConfigError, match=r"model\.layers\..* does not fit the marlin layout"):
        awq.convert(source, tmp_path / "out", "marlin")
    assert not (tmp_path / "out").exists()


def test_mlx_gives_the_codes_back_and_casts_the_rest(source: Path, tmp_path: Path) -> None:
    result = awq.convert(source, tmp_path / "mlx", "mlx")
    assert any("float16" in note for note in result.notes)
    config = config_of(tmp_path / "mlx")
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"
    floats = {
        t.dtype for name, t in read(tmp_path / "mlx").items() if t.is_floating_point() and "mtp" not in name
    }
    assert floats == {torch.float16}
    awq.convert(tmp_path / "mlx", tmp_path / "back", "gemm")
    before, after = read(source), read(tmp_path / "back")
    assert set(before) == set(after)
    for name in before:
        if name.rpartition(".")[2] in ("qweight", "qzeros", "scales"):
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("target", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_s_configuration_says_whether_every_zero_point_is_the_middle_code(
    symmetric: bool, target: str, source: Path, tmp_path: Path
) -> None:
    first = iter([8 if symmetric else 7])

    def change(weight: QuantizedWeight) -> None:
        weight.zeros.fill_(8)
        weight.zeros[0, 0] = next(first, 8)

    folder = Path(shutil.copytree(source, tmp_path / "middle"))
    _edit(folder, change)
    awq.convert(folder, tmp_path / "out", target)
    assert config_of(tmp_path / "out")["quantization_config"]["sym"] is symmetric


def test_untouched_tensors_and_files_are_carried_over(source: Path, tmp_path: Path) -> None:
    awq.convert(source, tmp_path / "out", "gptq")
    before, after = read(source), read(tmp_path / "out")
    for name in ("mtp.head.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(before[name], after[name])
    for name in before:
        if name.endswith("bias"):
            assert torch.equal(before[name], after[name])
    assert (tmp_path / "out" / "extra" / "template.jinja").read_text() == "{{ kept }}"
    assert not (tmp_path / "out" / "quant_config.json").exists()
    assert not (tmp_path / "out" / WORK_FOLDER).exists()
    entry = config_of(tmp_path / "out")["quantization_config"]
    assert entry["dynamic"] == {r"-:^model\.layers\.1\.mlp\.down_proj$": {}}


def test_shards_are_cut_and_read_again(source: Path, tmp_path: Path) -> None:
    awq.convert(source, tmp_path / "small", "gemv", max_shard_bytes=60_000)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 2
    awq.convert(tmp_path / "small", tmp_path / "back", "gemm")
    before, after = read(source), read(tmp_path / "back")
    assert set(before) == set(after)
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_a_layer_that_does_not_fit_is_named_and_nothing_is_left_behind(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "zero"))
    _edit(folder, lambda weight: weight.zeros.__setitem__((3, 1), 0))
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.\S+ does not fit the gptq layout.*gptq_v2"):
        awq.convert(folder, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError):
        awq.convert(folder, tmp_path / "mine", "gptq")
    assert list((tmp_path / "mine").iterdir()) == []
    awq.convert(folder, tmp_path / "out", "gptq_v2")


def test_little_is_held_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = ShardWriter.write

    def recording(writer: ShardWriter, tensors: Any) -> None:
        chunk = list(tensors)
        written.append(sum(tensor.nbytes for _, tensor in chunk))
        write(writer, chunk)

    monkeypatch.setattr(ShardWriter, "write", recording)
    monkeypatch.setattr("awq.pipeline.writer._TOGETHER", 20_000)
    awq.convert(source, tmp_path / "out", "gptq")
    largest = max(tensor.nbytes for tensor in read(source).values())
    assert len(written) > 3
    assert max(written) < 20_000 + largest


def test_an_interruption_leaves_nothing_and_an_older_one_is_cleared(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        awq.convert(source, tmp_path / "out", "gptq", progress=interrupt)
    assert not (tmp_path / "out").exists()
    # A killed process could not clear up.
    (tmp_path / "out" / WORK_FOLDER / "extra").mkdir(parents=True)
    (tmp_path / "out" / WORK_FOLDER / "model.safetensors").write_bytes(b"half")
    awq.convert(source, tmp_path / "out", "gptq")
    assert QuantizedCheckpoint(tmp_path / "out").weight("model.layers.0.mlp.up_proj").bits == 4
    assert not (tmp_path / "out" / WORK_FOLDER).exists()


def test_inspect_reads_every_layout(source: Path, tmp_path: Path) -> None:
    facts = {}
    for target in ("gemm", "gemv_fast", "compressed-tensors"):
        folder = source if target == "gemm" else tmp_path / target
        if target != "gemm":
            awq.convert(source, folder, target)
        result = CliRunner().invoke(app, ["inspect", str(folder), "--json", str(tmp_path / "facts.json")])
        assert result.exit_code == 0, result.output
        facts[target] = json.loads((tmp_path / "facts.json").read_text())
        assert facts[target]["layout"] == target
        assert facts[target]["quantized_layers"] == 13
        assert facts[target]["quantized_weights"] == facts["gemm"]["quantized_weights"]
        assert facts[target]["group_sizes"] == [64]
        assert facts[target]["float_bytes"] == facts["gemm"]["float_bytes"]
    assert facts["gemm"]["bits_per_quantized_weight"] == pytest.approx(4 + (16 + 4) / 64)


def test_a_finished_checkpoint_is_overwritten_on_purpose_only(source: Path, tmp_path: Path) -> None:
    awq.convert(source, tmp_path / "out", "gemv", max_shard_bytes=60_000)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="finished checkpoint"):
        awq.convert(source, tmp_path / "out", "gptq")
    awq.convert(source, tmp_path / "out", "gptq", overwrite=True)
    assert QuantizedCheckpoint(tmp_path / "out").detected.layout == "gptq"
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("gemm", "in the gemm layout already"),
        ("marlin", r"\S+ does not fit the marlin layout: a zero point is not 8: .* use gemm, which engines"),
        ("exllama", "on disk it is `gemm`"),
        ("float", "'float' is unknown"),
        ("nonsense", "'nonsense' is unknown"),
    ],
)
def test_a_target_without_meaning_is_refused(target: str, reason: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        awq.convert(source, tmp_path / "out", target)


def test_the_checkpoint_itself_and_a_float_model_are_refused(
    source: Path, tmp_path: Path, books6m: Path
) -> None:
    with pytest.raises(OutputExistsError, match="own"):
        awq.convert(source, source, "gemv", overwrite=True)
    with pytest.raises(ConfigError, match="no quantized checkpoint"):
        awq.convert(books6m, tmp_path / "out", "gemv")


def test_an_older_configuration_beside_the_weights_is_read(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "old"))
    config = config_of(folder)
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quant_config.json").write_text(
        json.dumps({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"})
    )
    awq.convert(folder, tmp_path / "out", "gemv")
    assert config_of(tmp_path / "out")["quantization_config"]["group_size"] == 64


def test_a_configuration_that_contradicts_the_tensors_is_refused(source: Path, tmp_path: Path) -> None:
    awq.convert(source, tmp_path / "gemv", "gemv")
    config = config_of(tmp_path / "gemv")
    config["quantization_config"]["group_size"] = 32
    (tmp_path / "gemv" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match=r"model\.layers\.0"):
        awq.convert(tmp_path / "gemv", tmp_path / "out", "gemm")
    config["quantization_config"]["version"] = "gemm"
    tensors = load_file(tmp_path / "gemv" / "model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if not k.endswith("qzeros")},
        tmp_path / "gemv" / "model.safetensors",
    )
    with pytest.raises(CorruptFileError, match="qzeros"):
        QuantizedCheckpoint(tmp_path / "gemv")


def test_quantized_embeddings_of_mlx_become_plain_weights(source: Path, tmp_path: Path) -> None:
    awq.convert(source, tmp_path / "mlx", "mlx")
    tensors = read(tmp_path / "mlx")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (128, 128), generator=generator, dtype=torch.uint8)
    # Offsets that are no zero points, as MLX's own quantizer writes them.
    packed = {
        "weight": pack_stream(codes, 4).view(torch.uint32),
        "scales": torch.full((128, 2), 0.01).half(),
        "biases": torch.full((128, 2), -0.0433).half(),
    }
    tensors |= {f"model.embed_tokens.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file(tensors, tmp_path / "mlx" / "model.safetensors", {"format": "mlx"})
    result = awq.convert(tmp_path / "mlx", tmp_path / "gemm", "gemm")
    assert any("embed_tokens" in note for note in result.notes)
    expected = (codes.float() * packed["scales"][0, 0].float() + packed["biases"][0, 0].float()).half()
    assert torch.equal(read(tmp_path / "gemm")["model.embed_tokens.weight"], expected)
    layer = "model.layers.0.self_attn.q_proj.biases"
    tensors[layer] = tensors[layer] * 1.03
    save_file(tensors, tmp_path / "mlx" / "model.safetensors", {"format": "mlx"})
    with pytest.raises(CorruptFileError, match=r"layers\.0\.self_attn\.q_proj.*no zero point"):
        awq.convert(tmp_path / "mlx", tmp_path / "again", "gemm")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_plain_weights_are_the_values_and_load_as_a_float_model(
    dtype: str | None, source: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    awq.export(source, tmp_path / "plain", "fp16", dtype=dtype)
    wanted = torch.bfloat16 if dtype else torch.float16
    config = config_of(tmp_path / "plain")
    assert "quantization_config" not in config
    assert config["dtype"] == str(wanted).removeprefix("torch.")
    checkpoint, plain = QuantizedCheckpoint(source), read(tmp_path / "plain")
    for name in checkpoint.layers:
        assert torch.equal(plain[f"{name}.weight"], checkpoint.weight(name).dequantize(wanted))
    assert {t.dtype for name, t in plain.items() if "mtp" not in name} == {wanted}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.dtype == wanted
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(name).weight.data, plain[f"{name}.weight"])


def test_a_float32_tensor_stays_so_in_a_model_that_is_not(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "mixed"))
    tensors = read(folder)
    tensors["model.layers.0.mlp.gate.e_score_correction_bias"] = torch.full((8,), 1e-6)
    save_file(tensors, folder / "model.safetensors")
    awq.export(folder, tmp_path / "plain", "fp16")
    kept = read(tmp_path / "plain")["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert kept.dtype == torch.float32


def test_a_value_too_large_for_float16_is_named(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "large"))
    tensors = read(folder)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"model\.norm\.weight.*bfloat16"):
        awq.export(folder, tmp_path / "out", "fp16")
    awq.export(folder, tmp_path / "out", "fp16", dtype="bfloat16")


@pytest.mark.parametrize(
    ("target", "dtype", "words"),
    [("gemm", None, "gemm"), ("mlx", "float16", "no meaning"), ("fp16", "int8", "int8")],
)
def test_an_export_without_meaning_is_refused(
    target: str, dtype: str | None, words: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        awq.export(source, tmp_path / "out", target, dtype=dtype)


def test_the_commands_convert_and_export(source: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["convert", str(source), str(tmp_path / "a"), "--to", "gemv", "--json", "-"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["target"] == "gemv"
    result = runner.invoke(app, ["export", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "fp16"])
    assert result.exit_code == 0, result.output
    assert "13 layers from gemv to float" in result.output
    failed = runner.invoke(app, ["convert", str(source), str(tmp_path / "c"), "--to", "nonsense"])
    assert isinstance(failed.exception, AwqError)

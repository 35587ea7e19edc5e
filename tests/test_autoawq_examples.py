"""The calls of AutoAWQ's README and examples that quantize, on the bundled model and text that is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from autoawq_calls import PROMPT, QUANT_CONFIG, SMALL, TEXTS, config_of
from awq import AutoAWQForCausalLM
from awq.auto_model import AWQModel
from awq.errors import AwqError, CalibrationError, ConfigError
from awq.legacy.config import AwqConfig
from awq.model.quantized import QuantizedCheckpoint
from awq.pipeline.convert import convert

_WHISPER = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}
pytestmark = pytest.mark.usefixtures("unanswered")


# quantize.py, basic_quant.py, cli.py


def test_the_quantize_example_writes_a_checkpoint_of_autoawqs_kind(quantized: Path) -> None:
    assert config_of(quantized)["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [],
    }
    assert "model.layers.0.self_attn.q_proj.qweight" in load_file(quantized / "model.safetensors")


def test_the_quantize_example_warns_of_nothing(
    books6m: Path, tokenizer: Any, tmp_path: Path, silent: None
) -> None:
    model = AutoAWQForCausalLM.from_pretrained(
        str(books6m), safetensors=True, low_cpu_mem_usage=True, use_cache=False
    )
    model.quantize(tokenizer, QUANT_CONFIG, TEXTS, "train", "text", True, False, False, None, 2, 32)
    model.save_quantized(f"{tmp_path}/out/")
    assert config_of(tmp_path / "out")["quantization_config"]["bits"] == 4


# quant_custom_data.py, and the long-context example of the documentation


def test_the_custom_data_example_takes_lists_of_texts_and_of_token_ids(
    books6m: Path, tokenizer: Any, tmp_path: Path
) -> None:
    ids = [tokenizer.encode(text.strip()) for text in TEXTS if text.strip()]
    weights = []
    for i, data in enumerate((TEXTS, ids)):
        model = AutoAWQForCausalLM.from_pretrained(str(books6m))
        model.quantize(
            tokenizer,
            quant_config=QUANT_CONFIG,
            calib_data=[text.strip() for text in data] if data is TEXTS else data,
            n_parallel_calib_samples=2,
            max_calib_samples=4,
            max_calib_seq_len=64,
        )
        assert model.report is not None and model.report.plan.batch_tokens == 128
        model.save_quantized(str(tmp_path / str(i)))
        weights.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_local_file_is_calibration_data_too(books6m: Path, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    model.quantize(tokenizer, QUANT_CONFIG, str(file), text_column="body", max_calib_samples=3)
    assert "3 samples" in model.report.plan.calibration


def test_calibration_data_of_another_kind_is_refused_before_any_work(books6m: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    with pytest.raises(CalibrationError, match="give a name or a list"):
        model.quantize(calib_data={"text": "a text"}, quant_config=QUANT_CONFIG)
    with pytest.raises(CalibrationError, match="input_ids must be whole numbers"):
        model.quantize(calib_data={"input_ids": torch.zeros(1, 4)}, quant_config=QUANT_CONFIG)


# mixtral_quant.py, whisper_quant.py


@pytest.mark.parametrize("where", ["configuration", "call", "both"])
def test_modules_to_not_convert_are_left_float(
    books6m: Path, tokenizer: Any, tmp_path: Path, where: str
) -> None:
    config = dict(QUANT_CONFIG)
    skip = {}
    if where in ("configuration", "both"):
        config["modules_to_not_convert"] = ["down_proj"]
    if where in ("call", "both"):
        skip["modules_to_not_convert"] = ["o_proj"] if where == "both" else ["down_proj"]
    model = AutoAWQForCausalLM.from_pretrained(str(books6m), safetensors=True, low_cpu_mem_usage=True)
    model.quantize(tokenizer, quant_config=config, apply_clip=False, **SMALL, **skip)
    model.save_quantized(str(tmp_path / "out"))
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert "model.layers.1.mlp.down_proj.weight" in tensors
    assert ("model.layers.1.self_attn.o_proj.weight" in tensors) == (where == "both")
    assert "model.layers.1.mlp.up_proj.qweight" in tensors


def test_the_mixtral_example_s_gate_is_the_router_and_no_part_of_the_experts(
    tiny: Any, token_lists: Any, tmp_path: Path
) -> None:
    tiny("mixtral", num_key_value_heads=2, num_local_experts=4).save_pretrained(tmp_path / "model")
    skip = ["gate"]
    model = AutoAWQForCausalLM.from_pretrained(str(tmp_path / "model"), safetensors=True)
    model.quantize(
        None,
        quant_config={**QUANT_CONFIG, "q_group_size": 32, "modules_to_not_convert": skip},
        modules_to_not_convert=skip,
        calib_data=token_lists,
    )
    model.save_quantized(str(tmp_path / "out"))
    layers = QuantizedCheckpoint(tmp_path / "out").layers
    assert sum(".experts." in name for name in layers) == 2 * 4 * 3
    assert not [name for name in layers if name.endswith("gate")]


def test_the_whisper_example_is_answered_in_a_sentence(token_lists: Any, tmp_path: Path) -> None:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _WHISPER.items()}
    config = WhisperConfig(d_model=64, vocab_size=128, pad_token_id=0, bos_token_id=1, **sizes)
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    model = AutoAWQForCausalLM.from_pretrained(str(tmp_path / "model"), use_cache=False)
    skip = ["encoder_attn", "encoder"]
    with pytest.raises(AwqError, match=r"an encoder with a decoder .* only decoders are quantized"):
        model.quantize(None, QUANT_CONFIG, token_lists, modules_to_not_convert=skip)


# marlin_quant.py


def test_the_marlin_example_writes_marlin_s_layout(books6m: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The example's configuration is symmetric; with zero points there is no such layout."""
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    with pytest.raises(ConfigError, match=r"holds symmetric codes alone, .* or set zero_point=False"):
        model.quantize(tokenizer, {**QUANT_CONFIG, "version": "Marlin"}, **SMALL)
    model.quantize(tokenizer, {**QUANT_CONFIG, "zero_point": False, "version": "Marlin"}, **SMALL)
    model.save_quantized(str(tmp_path / "out"))
    entry = config_of(tmp_path / "out")["quantization_config"]
    assert (entry["version"], entry["zero_point"]) == ("marlin", False)
    convert(tmp_path / "out", tmp_path / "gemm", "gemm")
    tokens = tokenizer("The sea was", return_tensors="pt").input_ids
    loaded, same = (AutoAWQForCausalLM.from_quantized(str(tmp_path / name)) for name in ("out", "gemm"))
    assert torch.equal(loaded(tokens).logits, same(tokens).logits)


@pytest.mark.parametrize("version", ["exllama", "ipex"])
def test_versions_that_name_a_kernel_write_gemm_and_say_so(
    books6m: Path, tokenizer: Any, tmp_path: Path, version: str
) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    with pytest.warns(UserWarning, match=f"version='{version}' has no effect: it names a kernel"):
        model.quantize(tokenizer, {**QUANT_CONFIG, "version": version}, apply_clip=False, **SMALL)
    assert model.quant_config.version == "gemm"
    model.save_quantized(str(tmp_path / "out"))
    assert config_of(tmp_path / "out")["quantization_config"]["version"] == "gemm"


def test_symmetric_codes_are_written_with_the_middle_code_for_a_zero_point(
    books6m: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    model.quantize(tokenizer, {**QUANT_CONFIG, "zero_point": False}, apply_clip=False, **SMALL)
    model.save_quantized(str(tmp_path / "out"))
    held = QuantizedCheckpoint(tmp_path / "out")
    assert bool((held.weight(next(iter(held.layers))).zeros == 8).all())


@pytest.mark.parametrize(
    ("version", "layout"), [("GEMV", "gemv"), ("GEMV_FAST", "gemv_fast"), ("GEMVFast", "gemv_fast")]
)
def test_autoawqs_other_layouts_are_written(
    books6m: Path, tokenizer: Any, tmp_path: Path, version: str, layout: str
) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    model.quantize(tokenizer, {**QUANT_CONFIG, "version": version}, apply_clip=False, **SMALL)
    assert model.quant_config.version == layout
    model.save_quantized(str(tmp_path / "out"))
    assert config_of(tmp_path / "out")["quantization_config"]["version"] == layout
    held = QuantizedCheckpoint(tmp_path / "out")
    assert held.detected.layout == layout


def test_a_layout_that_cannot_hold_the_model_leaves_it_quantized(
    tiny: Any, token_lists: Any, tmp_path: Path
) -> None:
    tiny("llama", intermediate_size=96).save_pretrained(tmp_path / "model")
    model = AutoAWQForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="save_quantized writes it as gemm"):
        model.quantize(None, {"q_group_size": 32, "version": "gemv_fast"}, token_lists)
    model.save_quantized(tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["version"] == "gemm"


# awq_to_gguf_quant.py, and the docstring of `pack`


@pytest.fixture(scope="module")
def folded(books6m: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AWQModel]:
    """A model for another tool to quantize, at another width, with no clipping."""
    folder = tmp_path_factory.mktemp("folded") / "out"
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    config = {**QUANT_CONFIG, "w_bit": 6}
    model.quantize(tokenizer, quant_config=config, export_compatible=True, apply_clip=False, **SMALL)
    assert model.report.verdict is None  # nothing is rounded yet
    model.save_quantized(str(folder), safetensors=True, shard_size="4GB")
    return folder, model


def test_an_exported_model_is_float_and_speaks_of_no_quantization(folded: Any) -> None:
    folder, _ = folded
    assert "quantization_config" not in config_of(folder)
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not [name for name in tensors if name.endswith("qweight")]


def test_an_exported_model_has_its_scales_folded_in_and_computes_the_same(
    folded: Any, books6m: Path, tokenizer: Any
) -> None:
    folder, _ = folded
    before, after = (load_file(f / "model.safetensors") for f in (books6m, folder))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert "model.layers.0.mlp.down_proj.weight" in changed
    assert "model.embed_tokens.weight" not in changed
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits
            for f in (books6m, folder)
        ]
    # Stored in bfloat16: folding rounds each weight anew, by one part in 512 at most.
    assert float((logits[0] - logits[1]).abs().max() / logits[0].std()) < 0.05


def test_a_width_that_the_layout_cannot_hold_is_refused_by_pack(folded: Any) -> None:
    _, model = folded
    with pytest.raises(ConfigError, match="bits=6"):
        model.pack()


def test_pack_gives_what_quantize_gives_without_the_export(
    books6m: Path, tokenizer: Any, quantized: Path, tmp_path: Path
) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    model.quantize(tokenizer, quant_config=QUANT_CONFIG, export_compatible=True, **SMALL)
    assert model.quant_config == AwqConfig()
    model.save_quantized(str(tmp_path / "out"))
    assert "model.layers.0.mlp.down_proj.weight" in load_file(tmp_path / "out/model.safetensors")
    model.pack()
    model.pack()
    model.save_quantized(str(tmp_path / "out"))  # in place of the export, as AutoAWQ did
    files = [(f / "model.safetensors").read_bytes() for f in (tmp_path / "out", quantized)]
    assert files[0] == files[1]


def test_pack_needs_something_to_pack(books6m: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to pack"):
        AutoAWQForCausalLM.from_pretrained(books6m).pack()


# quantize_qwen2vl.py, pixtral_multimodal.py: the class by name, a quantizer class of one's own, 4 GB shards


def test_a_class_of_one_architecture_is_the_one_class(books6m: Path, quantized: Path) -> None:
    from awq.models.llama import LlamaAWQForCausalLM
    from awq.models.qwen2vl import Qwen2VLAWQForCausalLM

    model = Qwen2VLAWQForCausalLM.from_pretrained(
        str(books6m), model_type="llama", use_cache=False, attn_implementation="eager"
    )
    assert isinstance(model, LlamaAWQForCausalLM) and not model.is_quantized
    assert model.model.config._attn_implementation == "eager"
    loaded = LlamaAWQForCausalLM.from_quantized(str(quantized), "llama", "", 2048, torch.float32)
    assert loaded.is_quantized and loaded.dtype == torch.float32


def test_the_qwen2_vl_example_calibrates_with_images(tmp_path: Path) -> None:
    """A processor's inputs as calib_data, and the quantizer class that AutoAWQ needed to catch them."""
    pytest.importorskip("PIL", reason="processors of images need Pillow")
    from awq.models.qwen2vl import Qwen2VLAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

    from zoo.processors import chat, picture, processor_of
    from zoo.vision import qwen2_vl

    class Qwen2VLAwqQuantizer(AwqQuantizer):
        def init_quant(self, n_samples: Any = None, max_seq_len: Any = None) -> Any:
            raise AssertionError("not called")

    processor = processor_of("qwen2_vl")
    model = Qwen2VLAWQForCausalLM.from_pretrained(
        str(qwen2_vl(tmp_path / "model")), model_type="qwen2_vl", use_cache=False, attn_implementation="eager"
    )
    dataset = [chat(picture(24, 16)), chat(picture(16, 40, seed=1), "And this?", "Nothing that I know of.")]
    text = processor.apply_chat_template(dataset, tokenize=False, add_generation_prompt=True)
    images = [conversation[0]["content"][0]["image"] for conversation in dataset]
    inputs = processor(text=text, images=images, padding=True, return_tensors="pt")
    config = {**QUANT_CONFIG, "q_group_size": 32}
    with pytest.warns(UserWarning, match="init_quant has no effect: inputs with images are calibration data"):
        model.quantize(calib_data=inputs, quant_config=config, quantizer_cls=Qwen2VLAwqQuantizer)
    assert "2 samples" in model.report.plan.calibration
    assert "(1 input with images)" in model.report.plan.calibration
    model.model.config.use_cache = model.model.generation_config.use_cache = True
    model.save_quantized(str(tmp_path / "out"), safetensors=True, shard_size="4GB")
    loaded = AutoAWQForCausalLM.from_quantized(str(tmp_path / "out"), device_map="cpu")
    assert type(loaded.model).__name__ == "Qwen2VLForConditionalGeneration"
    assert (
        loaded.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1]
        == inputs["input_ids"].shape[1] + 2
    )


def test_a_derived_quantizer_is_refused_before_any_work(books6m: Path) -> None:
    from awq.quantize.quantizer import AwqQuantizer

    class Own(AwqQuantizer):
        def _search_best_scale(self) -> None:
            pass

    model = AutoAWQForCausalLM.from_pretrained(books6m)
    with pytest.raises(ConfigError, match="quantizer_cls='Own'"):
        model.quantize(calib_data=TEXTS, quant_config=QUANT_CONFIG, quantizer_cls=Own)
    model.quantize(quant_config=QUANT_CONFIG, quantizer_cls=AwqQuantizer, **SMALL)
    assert model.is_quantized


def test_deriving_a_model_class_says_that_its_hooks_are_not_called() -> None:
    from awq.models.base import BaseAWQForCausalLM

    with pytest.warns(UserWarning, match="hooks of a class derived from BaseAWQForCausalLM are not called"):

        class OwnAWQForCausalLM(BaseAWQForCausalLM):
            layer_type = "OwnDecoderLayer"

    assert OwnAWQForCausalLM.layer_type == "OwnDecoderLayer"

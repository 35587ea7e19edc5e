"""The calls of AutoAWQ's README and example scripts, on the bundled model and with text that is at hand."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from awq.utils.utils import get_best_device
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TextStreamer,
    Trainer,
    TrainingArguments,
)

from awq import AutoAWQForCausalLM, QuantConfig, folder_model
from awq.auto_model import AWQModel
from awq.errors import AlreadyQuantizedError, CalibrationError, ConfigError, OutputExistsError
from awq.hf import load_quantized
from awq.legacy import arguments
from awq.legacy.config import AwqConfig
from awq.model.quantized import QuantizedCheckpoint

QUANT_CONFIG = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
TEXTS = [
    "The captain looked at the sea, and said nothing for a long time. " * 6,
    "She opened the letter and read it twice, standing by the window of the old house.",
    "It was a cold morning in March, and the road to the village was white with frost.",
    "  ",
]
SMALL = {"calib_data": TEXTS, "max_calib_samples": 4, "max_calib_seq_len": 64}
PROMPT = "The captain looked at the sea and"


@pytest.fixture(autouse=True)
def unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a process of its own as to what was warned of."""
    monkeypatch.setattr(arguments, "_answered", set())


@pytest.fixture(scope="module")
def tokenizer(books6m: Path) -> Any:
    return AutoTokenizer.from_pretrained(books6m, trust_remote_code=True)


@pytest.fixture(scope="module")
def quantized(books6m: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What AutoAWQ's first example writes."""
    folder = tmp_path_factory.mktemp("surface") / "books6m-awq"
    model = AutoAWQForCausalLM.from_pretrained(str(books6m), low_cpu_mem_usage=True, use_cache=False)
    model.quantize(tokenizer, quant_config=QUANT_CONFIG, **SMALL)
    model.save_quantized(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture
def silent() -> Iterator[None]:
    """No warning of ours may appear."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* has no effect: ")
        yield


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


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


# generate.py, basic_generate.py, exllama_generate.py, marlin_generate.py


def test_the_generate_example_streams_a_continuation(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoAWQForCausalLM.from_quantized(
        str(quantized), torch_dtype=torch.float16, low_cpu_mem_usage=True, device_map="auto"
    )
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    inputs = tokenizer(PROMPT, return_tensors="pt").to(get_best_device())
    output = model.generate(
        **inputs,
        do_sample=True,
        max_new_tokens=8,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        eos_token_id=[tokenizer.eos_token_id],
    )
    assert model.dtype == torch.float16
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert capsys.readouterr().out.strip()


def test_the_readmes_max_seq_len_limits_the_length(quantized: Path, tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="fuse_layers has no effect"):
        model = AutoAWQForCausalLM.from_quantized(str(quantized), fuse_layers=True)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    longest = tokens.shape[1] + 3
    assert model.generate(tokens, max_seq_len=longest, min_length=longest).shape[1] == longest


def test_every_kernel_switch_gives_the_same_tokens(quantized: Path, tokenizer: Any) -> None:
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    plain = AutoAWQForCausalLM.from_quantized(str(quantized), fuse_layers=False)
    expected = plain.generate(tokens, max_new_tokens=8)
    for switch in ("use_exllama", "use_exllama_v2", "use_ipex", "use_qbits"):
        with pytest.warns(UserWarning, match=f"{switch} has no effect"):
            other = AutoAWQForCausalLM.from_quantized(str(quantized), fuse_layers=False, **{switch: True})
        assert torch.equal(other.generate(tokens, max_new_tokens=8), expected)


# benchmark.py: positional file name, max_new_tokens when loading, calls with a cache


def test_the_benchmark_example_decodes_by_hand(quantized: Path, tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="max_new_tokens has no effect"):
        model = AutoAWQForCausalLM.from_quantized(
            str(quantized), "model.safetensors", fuse_layers=False, max_new_tokens=4, batch_size=1
        )
    device = next(model.parameters()).device
    ids = torch.randint(0, tokenizer.vocab_size, (2, 8))
    out = model(torch.as_tensor(ids, device=device), use_cache=True)
    token = out[0][:, -1].max(1)[1].unsqueeze(1)
    assert token.shape == (2, 1)


# eval.py


def test_the_eval_example_measures_perplexity(
    books6m: Path, quantized: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from awq.evaluation.eval_utils import evaluate_perplexity

    from awq.calibration import read_text

    datasets = pytest.importorskip("datasets", reason="an optional package of the product")
    held_out = read_text("bundled")[:20_000]
    rows = {"text": [held_out[:9000], held_out[9000:]]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    model = AutoAWQForCausalLM.from_quantized(str(quantized), "", fuse_layers=False)
    assert 5 < evaluate_perplexity(model.model, tokenizer) < 200
    with pytest.warns(UserWarning, match="safetensors has no effect"):
        original = AutoAWQForCausalLM.from_pretrained(str(books6m), safetensors=False)
    assert evaluate_perplexity(original.model, tokenizer) < evaluate_perplexity(model.model, tokenizer)


def test_the_eval_example_s_imports_are_all_there() -> None:
    from awq.evaluation.eval_utils import eval_librispeech, eval_mmlu, evaluate_perplexity

    assert all(map(callable, (eval_librispeech, eval_mmlu, evaluate_perplexity)))


# train.py


def test_the_training_example_trains_an_adapter_and_saves_it(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the example has it, but for `evaluation_strategy`, which transformers renamed `eval_strategy`."""
    datasets = pytest.importorskip("datasets", reason="an optional package of the product")
    peft = pytest.importorskip("peft", reason="an optional package of the product")
    rows = {"instruction": ["Say where you are.", "Count."], "output": ["At sea.", "One, two, three."]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_dict(rows))
    monkeypatch.chdir(tmp_path)

    def prepare_split(tokenizer: Any) -> Any:
        data = datasets.load_dataset("mhenrichsen/alpaca_2k_test", split="train")
        template = "<s>[INST] {prompt} [/INST] {output}</s>"
        data = data.map(
            lambda x: {"text": template.format(prompt=x["instruction"], output=x["output"])}
        ).select_columns(["text"])
        return data.map(lambda x: tokenizer(x["text"]), batched=True)

    model = AutoAWQForCausalLM.from_quantized(str(quantized), fuse_layers=False)
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    tokenizer.pad_token = tokenizer.eos_token
    data_train = prepare_split(tokenizer)
    lora_config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.5, bias="none", task_type=peft.TaskType.CAUSAL_LM,
        inference_mode=False,
    )  # fmt: skip
    model = peft.get_peft_model(model.model, lora_config)
    model.print_trainable_parameters()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    training_arguments = TrainingArguments(
        output_dir="./output", per_device_train_batch_size=1, optim="adamw_torch", num_train_epochs=1,
        learning_rate=1e-4, eval_strategy="no", save_strategy="epoch", save_steps=100, logging_steps=50,
        eval_steps=None, load_best_model_at_end=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        train_dataset=data_train,
        args=training_arguments,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model("output")
    assert trainer.state.global_step == 2
    changed = {n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert {name for name in before if "lora_B" in name} <= changed
    saved = load_file(tmp_path / "output/adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)


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


# marlin_quant.py


def test_the_marlin_example_is_answered_in_a_sentence(books6m: Path, tokenizer: Any) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    with pytest.raises(ConfigError, match=r"version='marlin' is how a kernel arranges .* write `gemm`"):
        model.quantize(tokenizer, {**QUANT_CONFIG, "zero_point": False, "version": "Marlin"}, **SMALL)
    with pytest.raises(ConfigError, match="zero_point=False is not supported"):
        model.quantize(tokenizer, {**QUANT_CONFIG, "zero_point": False}, **SMALL)


@pytest.mark.parametrize("version", ["GEMV", "gemv_fast"])
def test_autoawqs_other_layouts_are_written(
    books6m: Path, tokenizer: Any, tmp_path: Path, version: str
) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    model.quantize(tokenizer, {**QUANT_CONFIG, "version": version}, apply_clip=False, **SMALL)
    assert model.quant_config.version == version.lower()
    model.save_quantized(str(tmp_path / "out"))
    assert config_of(tmp_path / "out")["quantization_config"]["version"] == version.lower()
    held = QuantizedCheckpoint(tmp_path / "out")
    assert held.detected.layout == version.lower()


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


def test_a_derived_quantizer_is_refused_before_any_work(books6m: Path) -> None:
    from awq.quantize.quantizer import AwqQuantizer

    class Own(AwqQuantizer):
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


# save_quantized


@pytest.mark.parametrize(("size", "most"), [("2MB", 2 * 10**6), ("1MiB", 2**20), (3_000_000, 3_000_000)])
def test_shard_size_is_honoured(quantized: Path, tmp_path: Path, size: str | int, most: int) -> None:
    AutoAWQForCausalLM.from_quantized(str(quantized)).save_quantized(str(tmp_path / "out"), shard_size=size)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    whole = load_file(quantized / "model.safetensors")
    largest = max(tensor.nbytes for tensor in whole.values())
    found = {}
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= max(most, largest)
        found |= tensors
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    again = AutoAWQForCausalLM.from_quantized(str(tmp_path / "out"))
    assert again.is_quantized


def test_a_size_without_meaning_is_refused(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shard_size='large'"):
        AutoAWQForCausalLM.from_quantized(str(quantized)).save_quantized(tmp_path, shard_size="large")


def test_asking_for_pickles_warns_and_writes_safetensors(quantized: Path, tmp_path: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(str(quantized))
    with pytest.warns(UserWarning, match="safetensors has no effect"):
        model.save_quantized(str(tmp_path / "out"), safetensors=False)
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_tokenizer_saved_before_the_model_stays(quantized: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"mine": true}')
    AutoAWQForCausalLM.from_quantized(str(quantized)).save_quantized(str(tmp_path))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"mine": True}
    assert (tmp_path / "tokenizer.json").exists()


def test_another_model_is_never_overwritten(quantized: Path, books6m: Path, tmp_path: Path) -> None:
    shutil.copytree(books6m, tmp_path / "original")
    before = (tmp_path / "original/model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="holds another model"):
        AutoAWQForCausalLM.from_quantized(str(quantized)).save_quantized(tmp_path / "original")
    assert (tmp_path / "original/model.safetensors").read_bytes() == before


def test_a_model_without_codes_is_not_saved(books6m: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to save"):
        AutoAWQForCausalLM.from_pretrained(books6m).save_quantized(tmp_path)


# what the object is


def test_the_float_model_answers_as_the_transformers_model_does(books6m: Path, tokenizer: Any) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m), torch_dtype=torch.float32)
    assert model.config.model_type == model.model_type == "llama"
    assert model.quant_config.to_dict() == AwqConfig().to_dict()
    assert model.search_result is None and model.processor is None
    assert model._model is None, "nothing so far needs the weights"
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    expected = AutoModelForCausalLM.from_pretrained(books6m, dtype=torch.float32)(ids).logits
    assert torch.equal(model.eval()(ids).logits, expected)
    assert torch.equal(model.to("cpu")(ids).logits, expected)
    assert model.train().training and not model.eval().training


def test_the_dtype_of_the_float_model_is_the_dtype_saved(books6m: Path, tmp_path: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m), torch_dtype=torch.float16)
    model.quantize(None, QUANT_CONFIG, **SMALL)
    model.save_quantized(str(tmp_path))
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        assert tensors.get_tensor("model.embed_tokens.weight").dtype == torch.float16
    assert config_of(tmp_path)["dtype"] == "float16"


def test_a_quantconfig_of_ours_counts_as_it_is(books6m: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m))
    model.quantize(None, QuantConfig(group_size=64, clip=False, method="rtn"), **SMALL)
    assert model.report.config["method"] == "rtn" and model.report.config["clip"] is False
    assert model.quant_config.q_group_size == 64


def test_each_entry_point_names_the_other(books6m: Path, quantized: Path) -> None:
    with pytest.raises(AlreadyQuantizedError, match="from_quantized"):
        AutoAWQForCausalLM.from_pretrained(str(quantized))
    with pytest.raises(ConfigError, match="from_pretrained"):
        AutoAWQForCausalLM.from_quantized(str(books6m))
    with pytest.raises(AlreadyQuantizedError, match="already"):
        AutoAWQForCausalLM.from_quantized(str(quantized)).quantize(None, QUANT_CONFIG, **SMALL)
    with pytest.raises(ConfigError, match="from_pretrained"):
        AutoAWQForCausalLM()


def test_another_weight_file_is_not_passed_over(quantized: Path) -> None:
    with pytest.raises(ConfigError, match=r"quant_filename='awq_model_w4_g128.pt'"):
        AutoAWQForCausalLM.from_quantized(str(quantized), "awq_model_w4_g128.pt")


def test_an_argument_without_effect_warns_once_at_the_callers_line(quantized: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            AutoAWQForCausalLM.from_quantized(str(quantized), max_seq_len=128, batch_size=4)
    ours = [warning for warning in caught if "has no effect" in str(warning.message)]
    assert sorted(str(warning.message).split()[0] for warning in ours) == ["batch_size", "max_seq_len"]
    assert {warning.filename for warning in ours} == {__file__}


def test_defaults_warn_of_nothing(quantized: Path, silent: None) -> None:
    AutoAWQForCausalLM.from_quantized(str(quantized), "", 2048, False, safetensors=True)


def test_placement_and_configuration_reach_the_loader(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def record(folder: Path, **kwargs: Any) -> Any:
        given.update(kwargs)
        return load_quantized(folder, **kwargs)

    monkeypatch.setattr(folder_model, "load_quantized", record)
    placing = {
        "device_map": "auto",
        "max_memory": {"cpu": "1GB"},
        "offload_folder": str(tmp_path / "offload"),
    }
    model = AutoAWQForCausalLM.from_quantized(
        str(quantized), **placing, attn_implementation="eager", download_kwargs={"revision": "main"}
    )
    assert given == {
        **placing,
        "dtype": "auto",
        "trust_remote_code": False,
        "attn_implementation": "eager",
    }
    assert model.config._attn_implementation == "eager"


def test_a_hub_name_is_fetched_with_the_download_options(
    books6m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        given.update(options, name=name)
        return str(books6m)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    options = {"revision": "v1", "ignore_patterns": ["*.md"]}
    model = AutoAWQForCausalLM.from_pretrained("owner/name", download_kwargs=options)
    assert given["name"] == "owner/name" and options.items() <= given.items()
    assert not [pattern for pattern in given["allow_patterns"] if pattern.endswith(".bin")]
    assert model.model_type == "llama"


def test_the_float_models_configuration_takes_use_cache(books6m: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(str(books6m), use_cache=True, attn_implementation="eager")
    assert model.model.config.use_cache is True
    assert model.model.config._attn_implementation == "eager"

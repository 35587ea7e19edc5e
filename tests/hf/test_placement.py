"""Models over several devices: maps that cannot work are refused, the others give what one device gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes
from torch.utils import backend_registration
from transformers import AutoConfig, AutoModelForCausalLM

import awq
from awq import AutoAWQForCausalLM
from awq.errors import ConfigError
from awq.formats.detect import detect
from awq.hf.placement import accelerator_of, check_map, check_memory, is_spread
from awq.hf.replace import Stored, replace_layers
from awq.model.weights import read_header
from awq.nn import QuantLinear
from rounded import quantized_pair

PARTS = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
)
IN_BLOCK = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as maps are looked at."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> Path:
    return quantized_pair(tiny("llama", num_key_value_heads=2), tmp_path)[0]


def skeleton(folder: Path) -> Any:
    """The quantized model of a checkpoint, without its weights."""
    config = AutoConfig.from_pretrained(folder)
    tensors, _ = read_header(folder / "model.safetensors")
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    replace_layers(model, Stored(tensors, detect(entry)))
    return model


def everything(**changes: Any) -> dict[str, Any]:
    return dict.fromkeys(PARTS, 0) | {name.replace("__", "."): device for name, device in changes.items()}


@pytest.mark.parametrize(
    "device_map",
    [
        {"": 0},
        {"": "cuda:1"},
        {"": torch.device("cuda", 1)},
        {"": "cpu"},
        everything(),
        everything(model__norm=1, lm_head="cuda:1"),
        everything(model__norm="cpu", lm_head="disk"),
        {"model": 0, "lm_head": 1},
        {"model": "disk", "lm_head": "cpu"},
        # What is aside is computed with on GPU 0, as the rest of the block.
        {name: 0 for name in PARTS if name != "model.layers.0"}
        | {f"model.layers.0.{part}": "cpu" if part == "mlp" else 0 for part in IN_BLOCK},
        # It has no tensors in a checkpoint, and is often left out.
        {name: 0 for name in PARTS if name != "model.rotary_emb"},
        "auto",
        None,
    ],
    ids=str,
)
def test_a_map_that_works_is_taken(device_map: Any, checkpoint: Path, two_gpus: None) -> None:
    check_map(skeleton(checkpoint), device_map)


@pytest.mark.parametrize(
    ("device_map", "told"),
    [
        ({"": "cpu", "model.layer.0": 0}, r"no part 'model\.layer\.0'; did you mean 'model\.layers\.0'\?"),
        ({"model": 0}, r"gives no place to lm_head\.weight"),
        ({"lm_head": 0}, r"gives no place to model\.embed_tokens\.weight, .* and \d+ more"),
        (everything(lm_head=2), r"'lm_head': there is no GPU 2 here; PyTorch sees 2, which count from 0"),
        (everything(lm_head=-1), "there is no GPU -1 here"),
        (everything(lm_head="cuda:5"), "there is no cuda:5 here"),
        (everything(lm_head="xpu:0"), "there is no xpu:0 here"),
        (everything(lm_head="warp"), r"'lm_head': 'warp' is no device; write a number, cuda:0, cpu or disk"),
        (everything(lm_head=None), "None is no device"),
        (
            {"": 0, "model.layers.1": "disk"},
            r"puts 'model\.layers\.1' on disk, and '', which holds it, as a whole",
        ),
        ({"model": "cpu", "model.layers.1": 0, "lm_head": 0}, r"'model', which holds it, as a whole on cpu"),
        (
            {name: 0 for name in PARTS if name != "model.layers.0"}
            | {f"model.layers.0.{part}": int(part == "mlp") for part in IN_BLOCK},
            r"splits model\.layers\.0 over cuda:0 and cuda:1; a LlamaDecoderLayer adds up",
        ),
        (
            # With two GPUs, nobody knows which of them computes with what is aside.
            {name: 1 for name in PARTS if name != "model.layers.0"}
            | {f"model.layers.0.{part}": "cpu" if part == "mlp" else 0 for part in IN_BLOCK},
            r"splits model\.layers\.0 over cuda:0 and whichever GPU offloaded parts are brought to",
        ),
        (
            everything() | {"model.layers.1.mlp.up_proj": 1},
            r"splits model\.layers\.1 over cuda:0 and cuda:1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_map_that_cannot_work_is_refused_with_the_part(
    device_map: Any, told: str, checkpoint: Path, two_gpus: None
) -> None:
    with pytest.raises(ConfigError, match=told):
        check_map(skeleton(checkpoint), device_map)


def test_one_tensor_is_not_put_on_two_devices(tiny: Any, tmp_path: Path, two_gpus: None) -> None:
    model = tiny("llama", num_key_value_heads=2, tie_word_embeddings=True)
    tied = skeleton(quantized_pair(model, tmp_path)[0])
    with pytest.raises(ConfigError, match=r"'lm_head' and 'model\.embed_tokens' on two devices"):
        check_map(tied, everything(lm_head=1))
    # Aside on the CPU, it is computed with on GPU 0.
    check_map(tied, everything(lm_head="cpu"))
    # Where one of the two goes, the other goes.
    check_map(tied, {name: 0 for name in PARTS if name != "lm_head"})


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ("20GiB", "is no dictionary of limits"),
        ({0: "a lot"}, "'a lot' for 0 is no size; write a number of bytes, or 20GiB"),
        ({"cpu": None}, "None for 'cpu' is no size"),
        ({7: "20GiB"}, "max_memory: there is no GPU 7 here; PyTorch sees 2"),
        ({"cuda:0": "20GiB"}, "'cuda:0' is no device; GPUs are numbers"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(limits: Any, told: str, two_gpus: None) -> None:
    check_memory({0: "20GiB", 1: 10**9, "cpu": "60GB", "disk": "900GB"})
    check_memory(None)
    with pytest.raises(ConfigError, match=told):
        check_memory(limits)


@pytest.mark.parametrize(
    "options",
    [{"device_map": {"": "warp"}}, {"max_memory": {"cpu": "a lot"}}, {"device_map": {"model": "cpu"}}],
    ids=str,
)
def test_every_way_of_loading_refuses_them(options: dict[str, Any], checkpoint: Path) -> None:
    with pytest.raises(ConfigError):
        awq.load_quantized(checkpoint, **options)
    with pytest.raises(ConfigError):
        AutoAWQForCausalLM.from_quantized(checkpoint, **options)
    if "max_memory" not in options:  # which transformers reads by itself
        with pytest.raises(ConfigError):
            AutoModelForCausalLM.from_pretrained(checkpoint, **options)


def test_limits_without_a_map_ask_for_one(checkpoint: Path, tmp_path: Path) -> None:
    limits = {"max_memory": {"cpu": 30_000}, "offload_folder": tmp_path / "offload"}
    model = awq.load_quantized(checkpoint, **limits)
    assert "disk" in model.hf_device_map.values()
    assert is_spread(model)
    assert not is_spread(awq.load_quantized(checkpoint, device_map="cpu"))


def test_a_quantized_model_is_measured_by_its_packed_tensors(checkpoint: Path) -> None:
    model = skeleton(checkpoint)
    tensors, _ = read_header(checkpoint / "model.safetensors")
    stored = sum(info.bytes for info in tensors.values())
    rotary = sum(buffer.nbytes for name, buffer in model.named_buffers() if "rotary" in name)
    assert compute_module_sizes(model)[""] == stored + rotary
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantLinear)
    # Codes, zero points and scales of 128 x 64 weights in groups of 32.
    assert compute_module_sizes(layer)[""] == 128 * 64 // 2 + 128 * 2 // 2 + 128 * 2 * 2


@pytest.mark.parametrize("tied", [False, True])
def test_maps_made_from_limits_keep_them_and_leave_blocks_and_tied_weights_whole(
    tied: bool, tiny: Any, tmp_path: Path, two_gpus: None
) -> None:
    model = tiny("llama", num_key_value_heads=2, num_hidden_layers=4, tie_word_embeddings=tied)
    model = skeleton(quantized_pair(model, tmp_path)[0])
    model.tie_weights()
    sizes = compute_module_sizes(model)
    block = sizes["model.layers.0"]
    # Room for what is not quantized and two blocks, besides the one that accelerate reserves.
    limits: dict[Any, int] = {0: sizes["model.embed_tokens"] + 3 * block, 1: block, "cpu": block}
    device_map = infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
    assert {0, 1} < set(device_map.values())
    for device, limit in limits.items():
        held = [name for name, place in device_map.items() if place == device]
        assert sum(sizes[name] for name in held if not (tied and name == "lm_head")) <= limit, device
    assert all(f"model.layers.{number}" in device_map for number in range(2))
    if tied:
        assert device_map["lm_head"] == device_map["model.embed_tokens"]
    check_map(model, device_map)


@pytest.mark.parametrize(
    ("device_map", "device"),
    [
        (None, None),
        ("auto", None),
        ("balanced", None),
        ("cpu", None),
        ({"": "cpu"}, None),
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        (1, "cuda:1"),
        ({"": torch.device("cuda", 1)}, "cuda:1"),
        ({"model.embed_tokens": "cpu", "model.layers.0": 1, "model.layers.1": 0}, "cuda:1"),
    ],
    ids=str,
)
def test_the_first_gpu_of_a_map_is_the_one_that_quantizes(
    device_map: Any, device: str | None, two_gpus: None
) -> None:
    assert accelerator_of(device_map) == device


def test_from_pretrained_hands_the_gpu_of_its_map_to_quantize(
    books6m: Path, monkeypatch: pytest.MonkeyPatch, two_gpus: None
) -> None:
    asked: list[Any] = []

    def quantize(*args: Any, **options: Any) -> None:
        asked.append(options.get("device"))
        raise KeyboardInterrupt

    monkeypatch.setattr("awq.auto_model.quantize", quantize)
    for place, options in (("cuda:1", {}), ("auto", {}), ("cuda:1", {"device": "cpu"})):
        model = AutoAWQForCausalLM.from_pretrained(books6m, device_map=place)
        with pytest.raises(KeyboardInterrupt):
            model.quantize(None, {"w_bit": 4}, **options)
    assert asked == ["cuda:1", None, "cpu"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `split_models.py` found, in a process of its own: its devices stay until the process ends."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch has no devices in plain Python")
    here = Path(__file__).parent
    paths = [str(Path(awq.__file__).parent.parent), str(here), str(here.parent)]
    done = subprocess.run(
        [sys.executable, str(here / "split_models.py"), str(tmp_path_factory.mktemp("split"))],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


WAYS = [
    *(f"llama: {way}" for way in ("by blocks", "auto", "limits alone", "AutoAWQ", "transformers")),
    *(f"llama: {way}" for way in ("transformers, on the CPU", "offloaded", "mlp offloaded")),
    *("llama: fused", "llama: fused, offloaded"),
    *(f"{family}: {way}" for family in ("tied", "mixtral") for way in ("by blocks", "offloaded", "fused")),
]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_model_over_two_devices_gives_what_it_gives_on_one(
    way: str, split: dict[str, dict[str, Any]]
) -> None:
    found = split[way]
    assert found["off"] < 1e-5
    assert found["same tokens"]
    assert found["on"] == "fake:0"
    computing = {place for place in found["places"] if place != "meta"}
    assert computing <= {"fake:0", "fake:1"}
    assert len(found["places"]) == 3 if way.endswith("offloaded") and "mlp" not in way else 2
    assert set(split) == set(WAYS)


@pytest.mark.slow
def test_layers_are_merged_with_those_beside_them_on_either_device(split: dict[str, dict[str, Any]]) -> None:
    # q/k/v and gate/up: three products of seven are saved in each block that is in memory.
    assert split["llama: by blocks"]["products"] == 4 * 7
    assert split["llama: fused"]["products"] == 4 * 4
    assert split["llama: offloaded"]["products"] == 2 * 7
    assert split["llama: fused, offloaded"]["products"] == 2 * 4
    told = [text for text in split["llama: fused"]["warned"] if "grows as it is needed" in text]
    assert len(told) == 1
    assert "spread over several devices" in told[0]


@pytest.mark.slow
def test_codes_that_stay_in_memory_although_offloaded_are_told_with_where(
    split: dict[str, dict[str, Any]],
) -> None:
    (told,) = split["llama: transformers, on the CPU"]["warned"]
    assert "keep their codes in memory, on fake:0" in told
    assert "pass offload_buffers=True" in told

"""Shared fixtures: the shipped model, tiny random models, and a quantized checkpoint made once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

# Tiny models gain nothing from threads, and on a busy machine threads that wait for one another lose tenfold.
# Processes that tests start inherit it. It must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

BOOKS6M = Path(str(resources.files("awq").joinpath("data/books6m")))

# Examples are cheap, but a busy machine may stall one of them.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# Sizes common to the tiny models: every linear layer divides by groups of 32 and by 8 rows.
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def books6m() -> Path:
    """The trained model that ships with the package."""
    return BOOKS6M


def tiny_model(model_type: str, **changes: Any) -> Any:
    """A random float32 model with lively norms, from transformers' own configuration class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        spread = 0.5 if parameter.dim() == 1 else 0.1
        parameter.data += torch.randn(parameter.shape, generator=generator) * spread
    return model


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The maker of tiny models."""
    return tiny_model


@pytest.fixture(scope="session")
def token_lists() -> list[list[int]]:
    """Ragged calibration samples for the tiny models."""
    generator = torch.Generator().manual_seed(2)
    lengths = (40, 40, 40, 33, 21, 40, 7, 1)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture
def unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test is a process of its own as to what was warned of."""
    from awq.legacy import arguments

    monkeypatch.setattr(arguments, "_answered", set())


@pytest.fixture
def silent() -> Iterator[None]:
    """No warning of ours may appear."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* has no effect: ")
        yield


@pytest.fixture(scope="session")
def tokenizer(books6m: Path) -> Any:
    """The trained model's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(books6m, trust_remote_code=True)


@pytest.fixture(scope="session")
def quantized(books6m: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, as AutoAWQ's first example quantizes it."""
    from autoawq_calls import QUANT_CONFIG, SMALL
    from awq import AutoAWQForCausalLM

    folder = tmp_path_factory.mktemp("surface") / "books6m-awq"
    model = AutoAWQForCausalLM.from_pretrained(str(books6m), low_cpu_mem_usage=True, use_cache=False)
    model.quantize(tokenizer, quant_config=QUANT_CONFIG, **SMALL)
    model.save_quantized(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def native_library() -> None:
    """Skips where the C++ products cannot be had, with the reason."""
    from awq.kernels import cpu_native

    found = cpu_native.load()
    if isinstance(found, str):
        pytest.skip(f"the C++ products cannot be used here: {found}")

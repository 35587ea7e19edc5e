"""Which of transformers' auto classes a configuration leads to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from awq.errors import StructureError
from awq.model import auto_class


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "AutoModelForCausalLM"),
        ("llava", "AutoModelForImageTextToText"),
        ("qwen2_vl", "AutoModelForImageTextToText"),
        ("gemma3", "AutoModelForImageTextToText"),
        ("gemma3_text", "AutoModelForCausalLM"),
        ("llama4", "AutoModelForImageTextToText"),
        ("qwen3_5", "AutoModelForImageTextToText"),
        ("qwen3_5_text", "AutoModelForCausalLM"),
        ("phi4_multimodal", "AutoModelForMultimodalLM"),
        ("qwen2_audio", "AutoModelForMultimodalLM"),
    ],
)
def test_a_configuration_leads_to_the_class_of_the_whole_model(model_type: str, name: str) -> None:
    assert auto_class(AutoConfig.for_model(model_type)).__name__ == name


def test_a_text_decoder_that_was_saved_alone_stays_one() -> None:
    config = AutoConfig.for_model("llama4", architectures=["Llama4ForCausalLM"])
    assert auto_class(config).__name__ == "AutoModelForCausalLM"
    config = AutoConfig.for_model("llama4", architectures=["Llama4ForConditionalGeneration"])
    assert auto_class(config).__name__ == "AutoModelForImageTextToText"


@pytest.mark.parametrize(
    ("offered", "name"),
    [
        (("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "AutoModelForCausalLM"),
        (("AutoModelForImageTextToText", "AutoModel"), "AutoModelForImageTextToText"),
        (("AutoModel",), "AutoModel"),
    ],
)
@pytest.mark.parametrize("trust", [True, False])
def test_remote_code_names_its_class(offered: tuple[str, ...], name: str, trust: bool) -> None:
    """Without trust transformers refuses it, in its own words."""
    config: Any = SimpleNamespace(auto_map=dict.fromkeys(offered, "modeling.Own"), model_type="own")
    assert auto_class(config, trust).__name__ == name


def test_remote_code_that_is_not_trusted_gives_way_to_transformers_own() -> None:
    config = AutoConfig.for_model("llava")
    config.auto_map = {"AutoModelForCausalLM": "modeling.Own"}
    assert auto_class(config).__name__ == "AutoModelForImageTextToText"
    assert auto_class(config, True).__name__ == "AutoModelForCausalLM"


def test_a_model_that_generates_no_text_is_refused() -> None:
    with pytest.raises(StructureError, match="no model that generates text for the model type 'vit'"):
        auto_class(AutoConfig.for_model("vit"))

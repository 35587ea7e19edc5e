"""What can be asked for, what cannot, and what is written into a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import awq
from awq import QuantConfig
from awq.errors import ConfigError


def test_the_defaults_are_autoawqs() -> None:
    config = QuantConfig()
    assert (config.bits, config.group_size, config.zero_point, config.format) == (4, 128, True, "gemm")


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().bits = 3  # type: ignore[misc]
    assert hash(QuantConfig()) == hash(QuantConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, r"bits=3: the 'gemm' format holds 4 bits"),
        ({"bits": 1, "format": "float"}, "bits=1: the 'float' format holds 2, 3, 4, 5, 6, 7, 8 bits"),
        ({"bits": "4"}, "bits must be a whole number, not '4'"),
        ({"bits": True}, "bits must be a whole number, not True"),
        ({"bits": 4.0}, r"bits must be a whole number, not 4\.0"),
        ({"group_size": 0}, "group_size=0 is not possible; use a multiple of 8"),
        ({"group_size": -2}, "group_size=-2 is not possible"),
        ({"group_size": 100}, "group_size=100 is not possible"),
        ({"group_size": None}, "group_size must be a whole number, not None"),
        ({"bits": 3, "format": "compressed-tensors"}, "3 bits fit into: mlx, gptq, gptq_v2, float, folded"),
        ({"format": "gptq"}, "gptq_v2"),
        ({"format": "mlx", "bits": 8, "dtype": "bfloat16"}, "too coarse"),
        ({"format": "gmem"}, "format='gmem' is unknown; choose one of: gemm"),
        ({"format": None}, "format=None is unknown"),
        ({"method": "gptq"}, "method='gptq' is unknown; choose one of: awq, rtn"),
        ({"rounding": "up"}, "rounding='up' is unknown; choose one of: auto, nearest, gptq"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"dtype": "float32"}, "dtype=float32: the 'gemm' format stores 16-bit scales"),
        ({"scale_steps": 0}, "scale_steps=0 must be at least 1"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of names, not 'lm_head'"),
        ({"modules_to_not_convert": [1]}, r"must be a list of names, not \[1\]"),
        ({"modules_to_not_convert": [""]}, "must be a list of names"),
    ],
)
def test_values_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**options)


@given(
    bits=st.integers(2, 8),
    group=st.one_of(st.just(-1), st.integers(1, 64).map(lambda n: 8 * n)),
    method=st.sampled_from(["awq", "rtn"]),
    rounding=st.sampled_from(["auto", "nearest", "gptq"]),
    dtype=st.sampled_from(["auto", "float16", "bfloat16", "float32"]),
    steps=st.integers(1, 40),
    flags=st.tuples(st.booleans(), st.booleans()),
    skipped=st.lists(st.text(min_size=1), max_size=3),
)
def test_every_configuration_survives_a_trip_through_json(
    bits: int,
    group: int,
    method: Any,
    rounding: Any,
    dtype: Any,
    steps: int,
    flags: tuple[bool, bool],
    skipped: list[str],
) -> None:
    duo, clip = flags
    config = QuantConfig(
        bits, group, True, "float", tuple(skipped), method, rounding, steps, duo, clip, dtype
    )
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_are_starting_points() -> None:
    assert QuantConfig.preset("balanced") == QuantConfig()
    assert QuantConfig.preset("best", tune=7, bits=4).tune == 7
    assert QuantConfig.preset("best").refine > QuantConfig().refine
    with pytest.raises(ConfigError, match="fast, balanced, best"):
        QuantConfig.preset("quick")


def test_autoawqs_dictionary_is_read() -> None:
    given_in_its_readme = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    assert QuantConfig.from_dict(given_in_its_readme) == QuantConfig(group_size=64)


def test_a_checkpoints_entry_is_read_back() -> None:
    config = QuantConfig(group_size=32)
    entry = config.to_hf(["lm_head"])
    assert QuantConfig.from_dict(entry) == QuantConfig(group_size=32, modules_to_not_convert=("lm_head",))
    assert QuantConfig.from_dict(entry | {"backend": "auto", "modules_to_not_convert": None}) == config


def test_the_entry_for_engines_is_exact() -> None:
    entry = QuantConfig(group_size=32, method="rtn", clip=False).to_hf(["model.layers.0.mlp.gate"])
    assert entry == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["model.layers.0.mlp.gate"],
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method='gptq' is not an AWQ checkpoint"),
        ({"w_bits": 4}, "unknown option 'w_bits'; known are: bits"),
        ({"w_bit": 5}, "bits=5"),
        ({"version": "quick"}, "format='quick' is unknown"),
    ],
)
def test_dictionaries_that_mean_something_else_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig.from_dict(values)


def test_groups_of_a_row() -> None:
    assert QuantConfig(group_size=64).groups(256) == 4
    assert QuantConfig(group_size=64).groups(100) == 0
    assert QuantConfig(group_size=-1).groups(100) == 1
    assert QuantConfig(group_size=-1).effective_group_size(100) == 100


def test_importing_the_package_is_light_and_its_face_is_complete() -> None:
    """`import awq` alone loads neither torch nor transformers; every public name can be had."""
    script = "import awq, sys; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    for name in awq.__all__:
        assert getattr(awq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        awq.nothing  # noqa: B018

"""`awq doctor`: what the machine will use, what it lacks, and how to get it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from awq.kernels import LayerSpec, choose, kernel_names, native


@pytest.fixture(autouse=True)
def _fresh() -> object:
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def test_it_tells_which_kernel_each_kind_of_layer_gets(awq: Any) -> None:
    done = awq("doctor", "--json", "-")
    assert done.code == 0, done.err
    told = {
        (row["layer"], dtype): row["kernel"]
        for row in done.json["kernels"]
        if row["device"] == "cpu"
        for dtype in row["dtype"].split(", ")
    }
    spec = LayerSpec("cpu", torch.bfloat16, 4096, 4096, 128)
    assert told["4096x4096, groups of 128", "bfloat16"] == choose(spec).kernel.name
    assert {dtype for _, dtype in told} == {"bfloat16", "float16", "float32"}
    assert set(told.values()) <= set(kernel_names())
    assert "4096x4096, groups of 128" in done.err  # for people, beside the JSON
    assert done.json["machine"]["threads"] == torch.get_num_threads()


def test_without_a_compiler_it_says_what_is_used_instead_and_what_to_install(
    awq: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    if not native.available():
        pytest.skip("the C++ products are not for this processor")
    monkeypatch.setenv("AWQ_KERNEL_CACHE", str(tmp_path))
    monkeypatch.delenv("AWQ_CPU_ISA", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    done = awq("doctor")
    assert done.code == 0, done.err
    assert "not used: no C++ compiler was found" in done.out
    assert "not cpu-w4a16: no C++ compiler was found" in done.out
    assert "missing: the C++ products" in done.out
    assert "apt install g++" in done.out
    assert not [warning for warning in recwarn if "C++" in str(warning.message)]  # told once, in the table


def test_a_missing_package_is_told_with_its_use_and_the_command_that_installs_it(
    awq: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "gguf":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    done = awq("doctor", "--json", "-")
    (item,) = [item for item in done.json["missing"] if item["what"] == "gguf"]
    assert item == {"what": "gguf", "for": "awq export --to gguf", "cure": "pip install 'openawq[gguf]'"}
    versions = {package["name"]: package["version"] for package in done.json["packages"]}
    assert versions["gguf"] is None
    assert versions["torch"] == real("torch")


def test_a_gpu_that_pytorch_does_not_see_is_told(awq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setenv("AWQ_CPU_ISA", "none")
    done = awq("doctor", "--json", "-")
    assert any(item["what"] == "the GPU" and "pytorch.org" in item["cure"] for item in done.json["missing"])

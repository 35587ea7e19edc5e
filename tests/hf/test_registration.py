"""`import awq` is enough, is quick, and can be undone. Each case needs a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rounded import quantized_pair


def run(code: str, *arguments: str) -> str:
    """Run a program; its output. Any use of the network fails it."""
    guard = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    command = [sys.executable, "-c", guard + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOAD = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="auto")
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.fixture
def checkpoint(tiny: Any, tmp_path: Path) -> str:
    return str(quantized_pair(tiny("llama", num_key_value_heads=2), tmp_path)[0])


def test_importing_awq_imports_neither_torch_nor_transformers() -> None:
    heavy = "import sys, awq; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    assert run(heavy) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import sys, awq\nfrom transformers import AutoModelForCausalLM\n",
        "import sys, transformers\nimport transformers.quantizers.auto\nimport awq\n"
        "from transformers import AutoModelForCausalLM\n",
    ],
    ids=["awq first", "transformers first"],
)
def test_after_plain_import_awq_transformers_loads_a_checkpoint_without_gptqmodel(
    imports: str, checkpoint: str
) -> None:
    assert importlib.util.find_spec("gptqmodel") is None
    assert run(imports + LOAD, checkpoint) == "QuantLinear"


def test_unregistering_gives_transformers_its_own_classes_back() -> None:
    out = run(
        "import awq, awq.hf\n"
        "from transformers import AwqConfig\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
        "print(table['awq'].__module__, AwqConfig(backend='torch').backend)\n"
        "awq.hf.unregister()\n"
        "print(table['awq'].__module__)\n"
        "try: AwqConfig(version='marlin')\n"
        "except ValueError as error: print(type(error).__name__)\n"
        "awq.hf.register()\n"
        "print(table['awq'].__module__, AwqConfig(backend='torch').backend)\n"
    )
    assert out.splitlines() == [
        "awq.hf.quantizer torch",
        "transformers.quantizers.quantizer_awq",
        "ValueError",
        "awq.hf.quantizer torch",
    ]


def test_unregistering_before_transformers_is_imported_leaves_no_trace() -> None:
    program = (
        "import awq, awq.hf, sys\n"
        "watching = lambda: [f for f in sys.meta_path if type(f).__module__.startswith('awq.hf')]\n"
        "print(len(watching())); awq.hf.unregister(); print(len(watching()))"
    )
    assert run(program).split() == ["1", "0"]


def test_the_configuration_alone_is_enough_to_be_extended() -> None:
    """`from transformers import AwqConfig` does not import transformers' table of quantizers."""
    out = run("import awq\nfrom transformers import AwqConfig\nprint(AwqConfig(version='marlin').format)")
    assert out == "gemm"


def test_our_own_module_may_be_imported_first_of_all() -> None:
    """It imports transformers, whose table is then made before the class that goes into it."""
    program = (
        "import awq.hf.quantizer\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
        "print(table['awq'].__module__)"
    )
    assert run(program) == "awq.hf.quantizer"

"""AutoAWQ 0.2.9's public surface against ours and against the migration page.

`tests/data/autoawq_0.2.9_signatures.json` was extracted from AutoAWQ's source package by
`tests/tools/autoawq_signatures.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import awq
from awq.auto import AutoAWQForCausalLM, AWQModel
from awq.errors import AwqError, RemovedError
from awq.legacy.config import AwqConfig
from awq.legacy.table import MODULES

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests/data/autoawq_0.2.9_signatures.json"
THEIRS: dict[str, dict[str, Any]] = json.loads(FIXTURE.read_text("utf-8"))
PAGE = (ROOT / "docs/migration.md").read_text("utf-8")
AUTO = THEIRS["awq.models.auto"]["AutoAWQForCausalLM"]
BASE = THEIRS["awq.models.base"]["BaseAWQForCausalLM"]

# Sections of the page with a table of arguments: AutoAWQ's signature, and ours.
CALLS = {
    "AutoAWQForCausalLM.from_pretrained": (AUTO["from_pretrained"], AutoAWQForCausalLM.from_pretrained),
    "AutoAWQForCausalLM.from_quantized": (AUTO["from_quantized"], AutoAWQForCausalLM.from_quantized),
    "BaseAWQForCausalLM.quantize": (BASE["quantize"], AWQModel.quantize),
    "BaseAWQForCausalLM.save_quantized": (BASE["save_quantized"], AWQModel.save_quantized),
}
# Defaults that differ on purpose, and why.
OTHER_DEFAULTS = {
    "trust_remote_code": "code from the network is not run unless asked for",
    "fuse_layers": "what it gains depends on model and device: only who asks for it gets it",
    "quant_config": "a mutable default",
    "quantizer_cls": "the same meaning",
    "torch_dtype": "of the base class: the checkpoint's own",
    "device_map": "of the base class: quantization picks its device",
    "model_type": "optional here",
}
NAMES = [f"{module}.{name}" for module, names in THEIRS.items() if module != "awq" for name in names]


def ours(function: Any) -> list[list[str]]:
    """A signature of ours as the fixture writes one."""
    stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
    out = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        name = stars.get(parameter.kind, "") + parameter.name
        empty = parameter.default is inspect.Parameter.empty
        out.append([name] if empty else [name, repr(parameter.default)])
    return out


def names_of(signature: list[list[str]]) -> list[str]:
    return [argument[0] for argument in signature]


def rows(heading: str) -> list[list[str]]:
    """The cells of every table row in a section of the page, code marks taken off the first three."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert section, f"the page has no section {heading!r}"
    table = [line for line in section[1].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [[cell.replace("`", "") for cell in row[:-1]] + row[-1:] for row in cells]


@pytest.mark.parametrize("call", CALLS)
def test_arguments_have_autoawqs_names_and_order(call: str) -> None:
    theirs, function = CALLS[call]
    assert names_of(ours(function)) == names_of(theirs)


@pytest.mark.parametrize("call", CALLS)
def test_defaults_are_autoawqs_but_for_the_listed_ones(call: str) -> None:
    theirs, function = CALLS[call]
    for (name, *default), (_, *own) in zip(theirs, ours(function), strict=True):
        same = [repr(eval(text)) for text in default if "Awq" not in text]
        assert own == same or name in OTHER_DEFAULTS, f"{name}: {default} there, {own} here"


@pytest.mark.parametrize("call", CALLS)
def test_the_page_lists_every_argument_with_both_defaults(call: str) -> None:
    theirs, function = CALLS[call]
    told = [tuple(row[:3]) for row in rows(call) if len(row) == 4]
    expected = [
        (name, "".join(default), "".join(own))
        for (name, *default), (_, *own) in zip(theirs, ours(function), strict=True)
    ]
    assert told == expected


@pytest.mark.parametrize("call", CALLS)
def test_the_page_gives_every_argument_a_fate(call: str) -> None:
    assert all(re.match("works|no effect|refused", fate) for *_, fate in rows(call))


@pytest.mark.parametrize("name", ["from_pretrained", "from_quantized"])
def test_the_base_class_takes_autoawqs_arguments_in_its_order(name: str) -> None:
    assert names_of(ours(getattr(AWQModel, name))) == names_of(BASE[name])


def test_every_method_of_the_model_is_here_and_on_the_page() -> None:
    told = {name for row in rows("The model's other members") for name in row[0].split(", ")}
    for name in BASE:
        assert name == "__init__" or hasattr(AWQModel, name)
        assert name == "__init__" or name in told or f"BaseAWQForCausalLM.{name}" in CALLS


def test_every_entry_of_the_configuration_is_on_the_page() -> None:
    fields = {name for name, what in THEIRS["awq.models._config"]["AwqConfig"].items() if what == "value"}
    told = {row[0] for row in rows("BaseAWQForCausalLM.quantize") if len(row) == 2}
    assert fields == told == set(AwqConfig.__dataclass_fields__)


def test_every_module_of_autoawq_is_found() -> None:
    assert set(THEIRS) - {"awq"} == MODULES
    for module in MODULES:
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_the_fate_that_the_page_tells(name: str) -> None:
    fate = next((fate for pattern, fate, _ in rows("Imports") if fnmatchcase(name, pattern)), None)
    module, _, attribute = name.rpartition(".")
    if fate == "works":
        assert getattr(importlib.import_module(module), attribute) is not None
    else:
        assert fate == "explains", f"the page says nothing of {name}"
        with pytest.raises(RemovedError, match=re.escape(f"{name} of AutoAWQ is not here: ")):
            getattr(importlib.import_module(module), attribute)


def test_a_removed_name_is_an_import_error_in_an_import_statement() -> None:
    with pytest.raises(ImportError, match="generate"):
        from awq.modules.fused.attn import QuantAttentionFused  # noqa: F401


def test_a_module_that_autoawq_never_had_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("awq.models.no_such_model")


def test_ways_named_in_the_explanations_exist() -> None:
    """Every dotted name of ours in an explanation or on the page can be reached."""
    from awq.legacy import table

    told = " ".join(table._REASONS.values()) + PAGE
    own = set(re.findall(r"\bawq(?:\.[A-Za-z]\w*)+", told))
    assert "awq.search.search_scale" in own
    for name in own:
        if name in MODULES or f"{name.rpartition('.')[0]}" in MODULES - {"awq.quantize"}:
            continue
        parts = name.split(".")
        value: Any = awq
        for i, part in enumerate(parts[1:], start=2):
            if isinstance(value, ModuleType) and not hasattr(value, part):
                value = importlib.import_module(".".join(parts[:i]))
            else:
                value = getattr(value, part)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "order",
    [
        "import awq; f = awq.quantize; import awq.quantize.quantizer",
        "from awq.quantize.quantizer import AwqQuantizer; import awq; f = awq.quantize",
        "from awq.quantize import scale; from awq import quantize as f; import awq",
    ],
)
def test_quantize_is_a_function_and_a_package_in_any_order(order: str) -> None:
    check = (
        "from awq.pipeline import quantize as real\n"
        "import inspect, awq.quantize.scale\n"
        "assert f is awq.quantize is real and list(inspect.signature(f).parameters)[:2] == ['model', 'out']\n"
        "print(awq.quantize.__doc__.splitlines()[0])"
    )
    assert run_python(f"{order}\n{check}") == "Quantize a model folder to a new folder.\n"


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "print([m for m in ('torch', 'transformers', 'awq.auto') if m in sys.modules])"
    assert run_python(f"import sys, awq\n{heavy}") == "[]\n"


def test_a_quantizer_class_can_be_derived_and_not_made() -> None:
    from awq.quantize.quantizer import AwqQuantizer, clear_memory, get_best_device

    class Own(AwqQuantizer):
        pass

    assert callable(clear_memory) and isinstance(get_best_device(), str)
    with pytest.raises(AwqError, match="Own: there is no quantizer object"):
        Own()


@pytest.mark.network
def test_the_fixture_is_what_the_package_index_has(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests/tools"))
    try:
        import autoawq_signatures
    finally:
        sys.path.pop(0)
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "autoawq==0.2.9",
        "--no-deps",
        "--no-binary",
        ":all:",
    ]
    subprocess.run([*download, "--no-build-isolation", "-d", str(tmp_path)], check=True, capture_output=True)
    (package,) = tmp_path.glob("autoawq-0.2.9*")
    assert autoawq_signatures.dump(autoawq_signatures.extract(package)) == FIXTURE.read_text("utf-8")

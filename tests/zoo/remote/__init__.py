"""Models whose code comes with their checkpoint."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from zoo.build import lively

CODE = Path(__file__).with_name("heron.py")


def heron(folder: Path, **changes: Any) -> Any:
    """Save a checkpoint of `heron.py` to `folder`, the code beside it; returns the model.

    Args:
        folder: where it goes.
        **changes: entries of its configuration.
    """
    spec = importlib.util.spec_from_file_location("heron", CODE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.HeronConfig(
        **changes,
        auto_map={"AutoConfig": "heron.HeronConfig", "AutoModelForCausalLM": "heron.HeronForCausalLM"},
    )
    model = module.HeronForCausalLM(config).eval()
    lively(model)
    model.save_pretrained(folder)
    shutil.copyfile(CODE, folder / "heron.py")
    return model

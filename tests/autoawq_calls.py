"""What the tests of AutoAWQ's calls have in common: its settings, and calibration text that is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUANT_CONFIG = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
TEXTS = [
    "The captain looked at the sea, and said nothing for a long time. " * 6,
    "She opened the letter and read it twice, standing by the window of the old house.",
    "It was a cold morning in March, and the road to the village was white with frost.",
    "  ",
]
SMALL = {"calib_data": TEXTS, "max_calib_samples": 4, "max_calib_seq_len": 64}
PROMPT = "The captain looked at the sea and"


def config_of(folder: Path) -> dict[str, Any]:
    """A model folder's `config.json`."""
    return json.loads((folder / "config.json").read_text())

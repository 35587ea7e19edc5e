"""The bundled model quantized on a GPU and on the CPU: as near to the original, if all is right there.

Each block keeps the better of what was searched for and plain rounding, so that a mistake on one device does
not break a model there. It shows here: in the divergence, and in what the blocks chose.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from awq import QuantConfig, load_quantized
from awq.evaluate import compare
from awq.pipeline import quantize
from common import subjects

# Standard errors of the divergence by which two devices may differ, which add up in other orders.
_APART = 4


def accuracy(device: str = "cuda", preset: str = "balanced") -> dict[str, Any]:
    """Divergence, its standard error, seconds, and blocks by what they chose: on `device` and on the CPU.

    W4 in groups of 128, with the tokens of `accuracy.py`, as a checkpoint that is read again.
    """
    options = argparse.Namespace(model=[], without_bundled=False, samples=128, seq_len=256, windows=100)
    ((subject, _),) = subjects(options, "w4g128")
    original = subject.float_model().to(device)
    evaluation = [ids.to(device) for ids in subject.evaluation]
    found: dict[str, Any] = {}
    for where in (device, "cpu"):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            report = quantize(
                subject.folder,
                Path(folder) / "out",
                QuantConfig.preset(preset),
                [row.tolist() for row in subject.calibration],
                samples=len(subject.calibration),
                seq_len=subject.window,
                device=where,
                verify=False,
            )
            seconds = time.perf_counter() - started
            place = torch.zeros(0, device=device).device
            model = load_quantized(
                Path(folder) / "out", dtype=torch.float32, device_map=str(place), kernel="torch"
            )
            near = compare(model, original, evaluation, window=subject.window)
        chosen = collections.Counter(block.outcome["chosen"] for block in report.blocks)
        found[where] = {"KL": near.kl, "standard error": near.kl_stderr, "seconds": seconds, **chosen}
        print(where, found[where], flush=True)
    ours, theirs = found[device], found["cpu"]
    apart = abs(ours["KL"] - theirs["KL"]) / max(theirs["standard error"], 1e-12)
    assert apart < _APART, f"{device} and the CPU differ by {apart:.1f} standard errors: {found}"
    return found

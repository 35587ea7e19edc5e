"""How PyTorch's idle threads wait in the command: what GNU's OpenMP itself says that it was told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import awq

COMMAND = "from awq.cli import main; main.app = lambda: __import__('torch'); main.run()"


@pytest.mark.skipif(
    not list((Path(torch.__file__).parent / "lib").glob("libgomp*")), reason="PyTorch has another OpenMP here"
)
@pytest.mark.parametrize(
    ("set_by_user", "told"),
    [
        ({}, ("PASSIVE", "10000")),
        ({"GOMP_SPINCOUNT": "77"}, ("PASSIVE", "77")),
        ({"OMP_WAIT_POLICY": "active"}, ("ACTIVE", "30000000000")),
    ],
)
def test_idle_threads_sleep_soon_unless_the_user_wants_otherwise(
    set_by_user: dict[str, str], told: tuple[str, str]
) -> None:
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment = plain | set_by_user | {"OMP_DISPLAY_ENV": "verbose"}
    environment["PYTHONPATH"] = str(Path(awq.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(r"OMP_WAIT_POLICY = '(\w+)'.*GOMP_SPINCOUNT = '(\d+)'", done.stderr, re.DOTALL)
    assert found is not None, done.stderr
    assert found.groups() == told

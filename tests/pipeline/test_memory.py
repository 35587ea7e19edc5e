"""What a GPU keeps is decided by what is free on it."""

from __future__ import annotations

import pytest
import torch

from awq.pipeline.memory import has_room


def test_a_gpu_keeps_a_quarter_of_what_is_free_and_a_cpu_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 80_000))
    assert has_room(torch.device("cuda"), 1000)
    assert not has_room(torch.device("cuda"), 1001)
    assert not has_room(torch.device("cpu"), 1)

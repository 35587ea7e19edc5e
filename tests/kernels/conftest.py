"""What tests of several kernels need."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def nvrtc() -> Any:
    """The real NVRTC."""
    module = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings, which compiles CUDA C++")
    try:
        module.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(f"needs NVRTC: {error}")
    return module

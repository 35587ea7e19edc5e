"""On-disk layouts: one file each, every one a pair of pack and unpack around the canonical weight."""

from __future__ import annotations

from awq.errors import ConfigError
from awq.formats import codes, compressed_tensors, gemm, gemv, marlin, mlx, plain
from awq.formats.gptq import gptq, gptq_v2
from awq.formats.interleaved import gemv_fast, llm_awq
from awq.formats.layout import LayerShape, Layout

__all__ = ["LAYOUTS", "LayerShape", "Layout", "gemm", "get_format", "mlx", "plain"]

LAYOUTS: dict[str, Layout] = {
    "gemm": gemm,
    "gemv": gemv,
    "gemv_fast": gemv_fast,
    "llm_awq": llm_awq,
    "gptq": gptq,
    "gptq_v2": gptq_v2,
    "compressed-tensors": compressed_tensors.asymmetric,
    "mlx": mlx,
    "marlin": marlin,
    "codes": codes,
    "float": plain,
    "folded": plain,
}


# Layouts that leave out the zero points where each of them is the middle code.
_SYMMETRIC: dict[str, Layout] = {"compressed-tensors": compressed_tensors.symmetric}


def get_format(name: str, symmetric: bool = False) -> Layout:
    """The layout of a name.

    Args:
        name: a name in `LAYOUTS`.
        symmetric: for weights whose zero points are all the middle code.

    Raises:
        ConfigError: there is none.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"format {name!r} is unknown; known are: {', '.join(LAYOUTS)}")
    return _SYMMETRIC.get(name, LAYOUTS[name]) if symmetric else LAYOUTS[name]

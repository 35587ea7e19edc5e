"""On-disk layouts: one file each, every one a pair of pack and unpack around the canonical weight."""

from __future__ import annotations

from awq.errors import ConfigError
from awq.formats import compressed_tensors, gemm, gemv, marlin, mlx, plain
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
    "compressed-tensors": compressed_tensors,
    "mlx": mlx,
    "marlin": marlin,
    "float": plain,
    "folded": plain,
}


def get_format(name: str) -> Layout:
    """The layout of a name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return LAYOUTS[name]
    except KeyError:
        raise ConfigError(f"format {name!r} is unknown; known are: {', '.join(LAYOUTS)}") from None

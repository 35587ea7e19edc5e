"""Pure tensor mathematics: statistics, scales, clips and codes. No modules, no files, no device moves."""

from awq.search.clip import search_clip
from awq.search.drift import DriftAccumulator
from awq.search.gram import GramAccumulator, InputStats, output_error
from awq.search.refine import refine
from awq.search.rounding import Codes, fake_quantize, full_range, gptq, nearest, quant_params
from awq.search.scale import ScaleChoice, ScaleGrid, search_scale

__all__ = [
    "Codes",
    "DriftAccumulator",
    "GramAccumulator",
    "InputStats",
    "ScaleChoice",
    "ScaleGrid",
    "fake_quantize",
    "full_range",
    "gptq",
    "nearest",
    "output_error",
    "quant_params",
    "refine",
    "search_clip",
    "search_scale",
]

"""Modules that hold quantized weights."""

from awq.nn.experts import QuantExperts
from awq.nn.linear import QuantLinear

__all__ = ["QuantExperts", "QuantLinear"]

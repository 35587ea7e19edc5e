"""Modules that hold quantized weights."""

from awq.nn.linear import QuantLinear

__all__ = ["QuantLinear"]

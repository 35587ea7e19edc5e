"""Modules that hold quantized weights."""

from awq.nn.experts import QuantExperts
from awq.nn.linear import QuantLinear
from awq.nn.merge import Merge, apart_because

__all__ = ["Merge", "QuantExperts", "QuantLinear", "apart_because"]

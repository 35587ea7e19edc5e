"""OpenAWQ inside transformers: a quantizer that loads AWQ checkpoints with no other package installed."""

from awq.hf.load import is_awq, load_quantized
from awq.hf.plain import load_float
from awq.hf.quantizer import register, unregister

__all__ = ["is_awq", "load_float", "load_quantized", "register", "unregister"]

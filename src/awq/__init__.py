"""OpenAWQ: activation-aware 4-bit quantization of Hugging Face language models."""

from awq.config import QuantConfig
from awq.errors import AwqError

__version__ = "0.1.0"
__all__ = ["AwqError", "QuantConfig", "__version__"]

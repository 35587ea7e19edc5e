"""Tiny random models of many architectures, made from transformers' own configuration classes.

`text.py` lists text models, as data; `build.py` makes one of them and saves it under its hub names.
"""

from zoo.build import build, lively
from zoo.text import TEXT, Architecture

__all__ = ["TEXT", "Architecture", "build", "lively"]

"""Products of activations with 4-bit weights, chosen by device, dtype and shape, with the reason told."""

from awq.kernels.operator import multiply
from awq.kernels.registry import Choice, Kernel, LayerSpec, choose, kernel_choices, kernel_names

__all__ = ["Choice", "Kernel", "LayerSpec", "choose", "kernel_choices", "kernel_names", "multiply"]

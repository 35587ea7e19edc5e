"""Quantized experts: `awq.model.experts` with `QuantLinear` layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from awq.errors import ConfigError
from awq.model.experts import Experts
from awq.nn.linear import QuantLinear


class QuantExperts(Experts):
    """The quantized experts of one layer, under the names that checkpoints and engines use."""

    @torch.compiler.disable(reason="which experts are hit depends on the data")
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original module's plain forward, on quantized experts."""
        return super().forward(*args, **kwargs)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module that was replaced, with float parameters; this one is of no use afterwards."""
        fused = self._fused
        layers = [
            layer for number in range(self.count) for layer in self.get_submodule(str(number)).children()
        ]
        if not all(isinstance(layer, QuantLinear) for layer in layers):
            raise ConfigError(
                "experts with adapters on them cannot be dequantized; unload the adapters first"
            )
        for name, part in self.parts.items():
            rows = [
                part.join([layer.dequantize(dtype).t() for layer in self.layers(number, part.projections)])
                for number in range(self.count)
            ]
            stacked = torch.stack([row if part.transposed else row.t() for row in rows])
            del fused.__dict__[name]
            fused.register_parameter(name, nn.Parameter(stacked, requires_grad=False))
        for name in self._held:
            fused.__dict__.pop(name, None)
            held = getattr(self, name)
            if isinstance(held, nn.Parameter):
                fused.register_parameter(name, held)
            else:
                fused.register_buffer(name, held)
        return fused

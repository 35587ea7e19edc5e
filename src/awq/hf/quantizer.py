"""The quantizer that transformers calls while it loads an AWQ checkpoint.

Layers are chosen by what the checkpoint holds (`*.qweight`), not by a list of exceptions: a layer whose codes
are in the file becomes a `QuantLinear`, any other stays as it is. Codes for something that is no linear layer
(experts fused into one parameter) are refused: left alone, transformers would initialise it at random.

transformers has no entry points for quantizers and refuses to register a taken name, so the class is put
into its table directly, and can be taken out again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto as _auto
from transformers.quantizers.base import HfQuantizer

from awq.errors import LoadError
from awq.model.names import names_in_model
from awq.model.weights import FLOAT_DTYPES, TensorInfo, read_header
from awq.nn import QuantLinear

_stock = _auto.AUTO_QUANTIZER_MAPPING["awq"]


class AwqQuantizer(HfQuantizer):
    """Loads AutoAWQ's GEMM layout into `QuantLinear`."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.kernel: str | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing but PyTorch is needed."""

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Any of float32, float16 and bfloat16 is served."""
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        tensors: dict[str, TensorInfo] = {}
        for file in checkpoint_files or []:
            tensors.update(read_header(Path(file))[0])
        replace_linears(model, tensors, self.quantization_config.bits)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        dtype: Any = model.dtype
        for module in model.modules():
            if isinstance(module, QuantLinear) and not module.qweight.is_meta:
                module.prepare(dtype, self.kernel)
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the tensors that were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes cannot be trained."""
        return False


def replace_linears(model: nn.Module, tensors: dict[str, TensorInfo], bits: int) -> list[str]:
    """Put a `QuantLinear` on the meta device wherever the checkpoint holds codes; returns their names.

    Raises:
        LoadError: codes belong to something that is no linear layer of this model, or do not fit it.
    """
    stems = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    named, converted = names_in_model(model, [f"{stem}.weight" for stem in stems])
    if converted:
        raise LoadError(
            f"the codes of {converted[0].removesuffix('.weight')} belong to experts that this version of "
            "transformers holds fused in one parameter; such a model cannot be loaded yet"
        )
    replaced = []
    for name, key in named.items():
        path, stem = name.removesuffix(".weight"), key.removesuffix(".weight")
        try:
            linear = model.get_submodule(path)
        except AttributeError:
            raise LoadError(
                f"the checkpoint holds codes for {stem}, which this model does not have"
            ) from None
        if not isinstance(linear, nn.Linear):
            raise LoadError(f"the checkpoint holds codes for {stem}, which is a {type(linear).__name__} here")
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _quant_linear(linear, stem, tensors, bits))
        replaced.append(path)
    return replaced


def _quant_linear(linear: nn.Linear, stem: str, tensors: dict[str, TensorInfo], bits: int) -> QuantLinear:
    """The empty layer that the checkpoint's tensors of `stem` fill."""
    try:
        codes, scales = tensors[f"{stem}.qweight"], tensors[f"{stem}.scales"]
    except KeyError as error:
        raise LoadError(f"the checkpoint holds codes for {stem} but no {error}") from None
    groups = scales.shape[0]
    expected = (linear.in_features, linear.out_features * bits // 32)
    if codes.shape != expected or not groups or linear.in_features % groups:
        raise LoadError(
            f"{stem}.qweight is {codes.shape} in {groups} groups where the model wants {expected}: "
            "the checkpoint and config.json disagree"
        )
    return QuantLinear(
        linear.in_features,
        linear.out_features,
        linear.in_features // groups,
        bits,
        linear.bias is not None,
        dtype=linear.weight.dtype,
        scales_dtype=FLOAT_DTYPES[scales.dtype],
        device="meta",
    )


def register() -> None:
    """Let transformers load AWQ checkpoints through OpenAWQ from now on."""
    _auto.AUTO_QUANTIZER_MAPPING["awq"] = AwqQuantizer


def unregister() -> None:
    """Give transformers its own class back."""
    _auto.AUTO_QUANTIZER_MAPPING["awq"] = _stock

"""The quantizer that transformers calls while it loads an AWQ checkpoint."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from awq.errors import ConfigError, LoadError
from awq.formats.detect import detect
from awq.hf.differences import told
from awq.hf.fuse import fuse
from awq.hf.placement import check_map
from awq.hf.replace import Stored, replace_layers
from awq.model.conv1d import conv1d_of
from awq.model.names import match_names
from awq.model.weights import TensorInfo, read_header
from awq.nn import QuantExperts, QuantLinear


class AwqQuantizer(HfQuantizer):
    """Loads AWQ checkpoints into `QuantLinear` and `QuantExperts`, and turns them back into float layers."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ConfigError(
                "AwqConfig loads quantized checkpoints, and this model is a float one: quantize it, with "
                "awq.quantize(model, out) or the command `awq quantize`"
            )
        super().__init__(quantization_config, **kwargs)
        backend = str(getattr(quantization_config.backend, "value", quantization_config.backend))
        self.kernel = None if backend == "auto" else backend
        self.has_experts = False
        # The path of an output head that was rounded after loading; see `awq.hf.head`.
        self.rounded_head: str | None = None
        self.do_fuse: bool = getattr(quantization_config, "do_fuse", False)
        self.fuse_max_seq_len: int | None = getattr(quantization_config, "fuse_max_seq_len", None)
        self._dtypes: dict[str, torch.dtype] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing but PyTorch is needed.

        Raises:
            ConfigError: the checkpoint is of a kind that cannot be read.
        """
        detect(self.quantization_config.to_dict())

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Any of float32, float16 and bfloat16 is served."""
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise LoadError("a quantized model is loaded from a folder or a hub name, not from a state dict")
        tensors: dict[str, TensorInfo] = {}
        for file in map(Path, checkpoint_files):
            if file.suffix != ".safetensors":
                raise LoadError(
                    f"{file} is a pickle, which can run code when opened; convert it to safetensors first"
                )
            tensors.update(read_header(file)[0])
        found = detect(self.quantization_config.to_dict(), {key.rpartition(".")[2] for key in tensors})
        replace_layers(model, Stored(tensors, found))
        check_map(model, kwargs.get("device_map"))
        self.has_experts = any(isinstance(module, QuantExperts) for module in model.modules())
        raise_on_differences(model, tensors)
        self._dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._cast(model)
        dtype: Any = model.dtype
        held = None
        for module in model.modules():
            if not isinstance(module, QuantLinear):
                continue
            if not module.is_away and not module.is_offloaded:
                module.prepare(dtype, self.kernel)
                if getattr(getattr(module, "_hf_hook", None), "offload", False):
                    held = module.held_tensors()[0].device
        if held is not None:
            warnings.warn(
                f"offloaded layers keep their codes in memory, on {held}, because accelerate leaves buffers "
                "there unless it is told otherwise: pass offload_buffers=True to from_pretrained",
                stacklevel=2,
            )
        if self.do_fuse:
            fuse(model, self.fuse_max_seq_len)
        return model

    def _cast(self, model: Any) -> None:
        """Undo a peculiarity of older transformers: renamed tensors keep the checkpoint's dtype."""
        kept = model._get_dtype_plan(model.dtype)
        for name, parameter in model.named_parameters():
            planned = self._dtypes.get(name, parameter.dtype)
            stays = any(re.search(pattern.replace("*", ".*"), name) for pattern in kept)
            if parameter.dtype != planned and not parameter.is_meta and not stays:
                parameter.data = parameter.data.to(planned)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        self._refuse_rounded_head("dequantized")
        # A configuration that has been saved spells its dtype.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantExperts):
                _swap(model, path, module.dequantize(dtype))
        for path, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                _swap(model, path, _float_linear(path, module, dtype))
        if self.has_experts:
            _save_experts_apart(model)
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the tensors that were loaded.

        Raises:
            ConfigError: one of them is no longer there.
        """
        self._refuse_rounded_head("saved")
        return True

    def _refuse_rounded_head(self, what: str) -> None:
        if self.rounded_head is not None:
            raise ConfigError(
                f"{self.rounded_head} was rounded when the model was loaded, and what it was before is gone: "
                f"load the model without head_bits for one that can be {what}"
            )

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of the codes can be trained; the codes themselves have no gradient."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Kernels are operators that `torch.compile` takes whole; which experts run depends on the data."""
        return not self.has_experts


def raise_on_differences(model: Any, tensors: dict[str, TensorInfo]) -> None:
    """Refuse a checkpoint that lacks parts of the base model or of the output layer, or has them misshapen.

    transformers would initialise them at random and print a table. Other heads are left to it: a fresh
    classifier on a quantized model is legitimate.

    Raises:
        LoadError: naming the first tensors that are missing or of another shape.
    """
    named, merges = match_names(model, tensors)
    present = set(named) | {target for merge in merges for target in merge.targets}
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if present & {target, source}:
            present |= {target, source}
    wanted = _base_and_output(model)
    ignored = model._keys_to_ignore_on_load_missing or ()
    missing = {name for name in wanted if not any(re.search(pattern, name) for pattern in ignored)} - present
    mismatched = {
        name
        for name in wanted & set(named)
        if tuple(model.get_parameter_or_buffer(name).shape) != tensors[named[name]].shape
    }
    problems = [told(title, names) for title, names in (("missing", missing), ("mismatched", mismatched))]
    if any(problems):
        raise LoadError(
            f"the checkpoint does not fit {type(model).__name__}: {'; '.join(filter(None, problems))}"
        )


def _base_and_output(model: Any) -> set[str]:
    """Names of the tensors that a checkpoint of this model must hold, whatever the head is for."""
    names = {name for name, _ in model.named_parameters()} | {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for name, _ in module.named_buffers()
    }
    if not hasattr(model, model.base_model_prefix):
        return names
    prefix, output = f"{model.base_model_prefix}.", model.get_output_embeddings()
    outputs = {path for path, module in model.named_modules() if module is output and output is not None}
    return {name for name in names if name.startswith(prefix) or name.rpartition(".")[0] in outputs}


def _swap(model: nn.Module, path: str, module: nn.Module) -> None:
    old = model.get_submodule(path)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module.train(old.training))


def _float_linear(path: str, layer: QuantLinear, dtype: torch.dtype) -> nn.Module:
    if layer.is_away:
        raise ConfigError(f"{path} is offloaded; load the model without offloading to dequantize it")
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return conv1d_of(linear) if layer.of_conv1d else linear


def _save_experts_apart(model: Any) -> None:
    """Have `save_pretrained` split fused experts: rules that loading did not use are forgotten by then."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]
    used = [rule for rule in model._weight_conversions if not isinstance(rule, WeightConverter)]
    model._weight_conversions = used + rules

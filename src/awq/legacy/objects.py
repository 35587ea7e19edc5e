"""What AutoAWQ's names stand for here, where no object of ours has the same call."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from awq.auto_model import AWQModel
from awq.calibration import load_calibration, rows_of
from awq.errors import ConfigError
from awq.formats import gemm
from awq.legacy.arguments import AwqQuantizer as AwqQuantizer
from awq.model.fetch import resolve
from awq.model.weights import read_json
from awq.nn import QuantLinear
from awq.weight import QuantizedWeight

# Kernels of AutoAWQ's CPU path. Ours needs neither package, and is not chosen by these.
ipex_available = importlib.util.find_spec("intel_extension_for_pytorch") is not None
triton_available = importlib.util.find_spec("triton") is not None

_ARCHITECTURES = (
    "mpt llama opt RefinedWeb RefinedWebModel exaone falcon bloom gptj gpt_bigcode mistral mixtral gpt_neox "
    "aquila Yi qwen baichuan llava qwen2 qwen3 qwen3_moe gemma gemma2 stablelm starcoder2 llava_next phi3 "
    "phi3_v cohere deepseek_v2 deepseek_v3 minicpm internlm2 minicpm3 qwen2_vl qwen2_5_vl qwen2_5_omni"
)
# AutoAWQ 0.2.9's. Others work too: a model's structure is discovered, not looked up.
AWQ_CAUSAL_LM_MODEL_MAP: dict[str, type[AWQModel]] = dict.fromkeys(_ARCHITECTURES.split(), AWQModel)


def check_and_get_model_type(
    model_dir: str | Path, trust_remote_code: bool = True, **model_init_kwargs: Any
) -> str:
    """The `model_type` of a model folder. No type is refused here, and no code of the model is run.

    Raises:
        MissingFileError: there is no such folder, or it has no config.json.
    """
    return str(read_json(resolve(model_dir) / "config.json").get("model_type"))


def get_best_device() -> str:
    """`mps`, `cuda:0`, `xpu:0` or `cpu`: the first that is there."""
    if torch.backends.mps.is_available():
        return "mps"
    if torch.cuda.is_available():
        return "cuda:0"
    return "xpu:0" if torch.xpu.is_available() else "cpu"


def clear_memory(weight: Any = None) -> None:
    """Collect garbage, and give an accelerator's unused memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def get_calib_dataset(
    data: Any = "pileval",
    tokenizer: Any = None,
    n_samples: int = 128,
    max_seq_len: int = 512,
    split: str = "train",
    text_column: str = "text",
) -> list[Tensor]:
    """Calibration samples, int64 `[1, tokens]` each.

    AutoAWQ left out documents longer than `max_seq_len` and glued the others; here long ones are cut in
    windows, and each sample comes from one document.

    Raises:
        CalibrationError: see `awq.calibration.load_calibration`.
    """
    found = load_calibration(
        data,
        tokenizer,
        samples=n_samples,
        seq_len=max_seq_len,
        split=None if data == "pileval" else split,
        text_column=text_column,
    )
    return [row.unsqueeze(0) for sample in found.samples for row in rows_of(sample)]


def dequantize_gemm(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int = 4, group_size: int = 128
) -> Tensor:
    """The weight behind a GEMM layer's tensors, `[in_features, out_features]` in the scales' dtype."""
    weight = gemm.unpack({"qweight": qweight, "qzeros": qzeros, "scales": scales}, bits)
    return weight.dequantize(scales.dtype).t().contiguous()


class _AnyQuantLinear(type):
    """Makes `isinstance(layer, WQLinear_GEMM)` true of the layers that a loaded model has."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, QuantLinear)


class WQLinear_GEMM(metaclass=_AnyQuantLinear):  # noqa: N801 - AutoAWQ's name
    """AutoAWQ's linear layer; what is made is an `awq.nn.QuantLinear`.

    Args:
        w_bit: width of a code: 4.
        group_size: input channels that share a scale; -1 for all.
        in_features, out_features: measures of the weight.
        bias: whether there is one.
        dev: device.
        training: no effect.
    """

    def __new__(
        cls,
        w_bit: int,
        group_size: int,
        in_features: int,
        out_features: int,
        bias: bool,
        dev: torch.device | str,
        training: bool = False,
    ) -> Any:
        """An empty layer, to be filled by `load_state_dict`."""
        size = in_features if group_size == -1 else group_size
        return QuantLinear(in_features, out_features, size, w_bit, bias, device=dev)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        w_bit: int,
        group_size: int,
        init_only: bool = False,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
    ) -> Any:
        """Round a linear layer's weight to the codes of given scales and zero points.

        Args:
            linear: weight `[out_features, in_features]`.
            w_bit, group_size: as above.
            init_only: make an empty layer.
            scales: `[groups, out_features]`; stored as float16.
            zeros: whole numbers, `[groups, out_features]`.

        Raises:
            ConfigError: `scales` or `zeros` is missing.
        """
        wide, tall = linear.in_features, linear.out_features
        if init_only:
            return cls(w_bit, group_size, wide, tall, linear.bias is not None, linear.weight.device)
        if scales is None or zeros is None:
            raise ConfigError("WQLinear_GEMM.from_linear needs scales and zeros, [groups, out_features] each")
        stored, points = scales.t().contiguous().half(), zeros.t().round()
        grouped = linear.weight.data.float().view(tall, stored.shape[1], -1)
        codes = (grouped / stored.float().unsqueeze(-1) + points.unsqueeze(-1)).round().clamp(0, 2**w_bit - 1)
        weight = QuantizedWeight(
            codes.view(tall, wide).to(torch.uint8), stored, points.to(torch.uint8).contiguous(), w_bit
        )
        bias = None if linear.bias is None else linear.bias.data.half()
        return QuantLinear.from_weight(weight, bias)


class _OtherLayout:
    """A layer class of AutoAWQ's other kernels: known by name for `isinstance`, of which nothing is one."""

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.from_linear()

    @classmethod
    def from_linear(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, and say what there is instead."""
        raise ConfigError(
            f"{cls.__name__}: layers do not differ by kernel; awq.nn.QuantLinear chooses its kernel, and "
            "`version` in the configuration chooses the layout on disk"
        )


WQLinear_GEMV = type("WQLinear_GEMV", (_OtherLayout,), {})
WQLinear_GEMVFast = type("WQLinear_GEMVFast", (_OtherLayout,), {})
WQLinear_Marlin = type("WQLinear_Marlin", (_OtherLayout,), {})
WQLinear_Exllama = type("WQLinear_Exllama", (_OtherLayout,), {})
WQLinear_ExllamaV2 = type("WQLinear_ExllamaV2", (_OtherLayout,), {})
WQLinear_IPEX = type("WQLinear_IPEX", (_OtherLayout,), {})

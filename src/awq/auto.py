"""`AutoAWQForCausalLM`: AutoAWQ's entry points. They hold no logic of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from awq.auto_model import AWQModel
from awq.errors import ConfigError
from awq.legacy.arguments import answer

__all__ = ["AWQModel", "AutoAWQForCausalLM"]


class AutoAWQForCausalLM:
    """Makes `AWQModel` objects; not instantiated itself."""

    def __init__(self) -> NoReturn:
        raise ConfigError("use AutoAWQForCausalLM.from_pretrained(…) or AutoAWQForCausalLM.from_quantized(…)")

    @staticmethod
    def from_pretrained(
        model_path: str | Path,
        torch_dtype: Any = "auto",
        trust_remote_code: bool = False,
        safetensors: bool = True,
        device_map: Any = None,
        download_kwargs: Mapping[str, Any] | None = None,
        low_cpu_mem_usage: bool = True,
        use_cache: bool = False,
        **model_init_kwargs: Any,
    ) -> AWQModel:
        """Open a float model for quantization.

        Args:
            model_path: a folder, or a hub name.
            torch_dtype: `float16` or `bfloat16` is also the dtype of the float tensors that are saved; by
                default each keeps its own.
            trust_remote_code: run modelling code that comes with the model (AutoAWQ's default was True).
            safetensors: without effect; pickled weights are not read.
            device_map: where the float model goes if it is called. Quantizing holds one block at a time, on
                one device: the first GPU that is named here, or else the one that it finds.
            download_kwargs: of `huggingface_hub.snapshot_download`, for a hub name.
            low_cpu_mem_usage: without effect.
            use_cache: of the float model's configuration, if it is called.
            **model_init_kwargs: of transformers' `from_pretrained`, if it is called; `max_memory` among them,
                which does not limit quantizing.

        Raises:
            AlreadyQuantizedError: the folder holds a quantized model.
            AwqError: it is no complete model.
        """
        return AWQModel.from_pretrained(
            model_path,
            None,
            torch_dtype,
            trust_remote_code,
            safetensors,
            device_map,
            download_kwargs,
            low_cpu_mem_usage,
            use_cache,
            **model_init_kwargs,
        )

    @staticmethod
    def from_quantized(
        quant_path: str | Path,
        quant_filename: str = "",
        max_seq_len: int = 2048,
        trust_remote_code: bool = False,
        fuse_layers: bool | None = None,
        use_exllama: bool = False,
        use_exllama_v2: bool = False,
        use_ipex: bool = False,
        batch_size: int = 1,
        safetensors: bool = True,
        device_map: Any = "balanced",
        max_memory: Any = None,
        offload_folder: str | None = None,
        download_kwargs: Mapping[str, Any] | None = None,
        **config_kwargs: Any,
    ) -> AWQModel:
        """Load a quantized checkpoint, ready to generate.

        Args:
            quant_path: a folder, or a hub name.
            quant_filename: may name the one safetensors file of the folder.
            trust_remote_code: run modelling code that comes with the model (AutoAWQ's default was True).
            fuse_layers: merge layers that read the same tensor, and generate with a static key/value cache.
                AutoAWQ had True; here only who asks gets it: what it gains depends on model and device.
            max_seq_len: with `fuse_layers`, tokens that the static cache holds; longer calls get a cache that
                grows, and a warning. On a CPU the default value asks for none.
            batch_size: taken care of; the cache is made for the batch of each call.
            use_exllama, use_exllama_v2, use_ipex, safetensors: without effect; a value that asks for
                something warns once.
            device_map, max_memory, offload_folder: as transformers takes them.
            download_kwargs: of `huggingface_hub.snapshot_download`, for a hub name.
            **config_kwargs: `torch_dtype` of the activations (the checkpoint's own by default), `kernel` to
                insist on one (the fastest that fits by default), `head_bits=8` to round the output head (see
                `load_quantized`), and further arguments of transformers' `from_pretrained`, configuration
                entries among them.

        Raises:
            ConfigError: the folder holds a float model.
            AwqError: the checkpoint cannot be loaded whole.
        """
        answer({"batch_size": batch_size != 1 and not fuse_layers})
        return AWQModel.from_quantized(
            quant_path,
            None,
            quant_filename,
            max_seq_len,
            trust_remote_code=trust_remote_code,
            safetensors=safetensors,
            fuse_layers=fuse_layers,
            use_exllama=use_exllama,
            use_exllama_v2=use_exllama_v2,
            use_ipex=use_ipex,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            download_kwargs=download_kwargs,
            **config_kwargs,
        )

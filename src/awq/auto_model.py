"""The object that `AutoAWQForCausalLM` makes: AutoAWQ's `BaseAWQForCausalLM` on OpenAWQ's pipeline.

It opens a folder and reads no weights until it is used as a model. `quantize` streams the folder to a working
folder, and `save_quantized` moves the result where it belongs. Names, order and meaning of the arguments are
AutoAWQ 0.2.9's; docs/migration.md lists the few whose default differs, and those without effect.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import convert_file_size_to_int

from awq.config import QuantConfig
from awq.errors import AlreadyQuantizedError, ConfigError, DiskFullError
from awq.folder_model import FolderModel
from awq.hf.fuse import fuse
from awq.hf.placement import accelerator_of
from awq.legacy.arguments import answer, check_filename, check_quantizer, read_settings, take_version
from awq.legacy.config import AwqConfig
from awq.model.fetch import resolve
from awq.model.weights import CheckpointReader, read_json
from awq.pipeline import Report, publish, quantize
from awq.pipeline.convert import convert

# AutoAWQ's layouts that are made from `gemm`.
_CONVERTED = ("gemv", "gemv_fast", "llm_awq", "marlin")
# AutoAWQ's defaults, which ask for nothing.
_CHUNK_MEMORY = 1024**3
_SEQ_LEN = 2048


class AWQModel(FolderModel):
    """A model that can be quantized, saved, called and asked to generate: AutoAWQ's `BaseAWQForCausalLM`.

    Whatever is not defined here is looked up in the transformers model, which is loaded for it.

    Attributes:
        is_quantized: whether it holds codes.
        report: what the quantization was like; None before.
    """

    search_result = None  # AutoAWQ has it, and never sets it either

    def __init__(
        self, folder: Path, trust_remote_code: bool, loading: dict[str, Any], is_quantized: bool
    ) -> None:
        super().__init__(folder, trust_remote_code, loading)
        self._work: tempfile.TemporaryDirectory[str] | None = None
        self._quantize_again: Callable[[], None] | None = None
        self._quant_config: AwqConfig | None = None
        self.is_quantized = is_quantized
        self.report: Report | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        answer({"subclass": True})

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        model_type: str | None = None,
        torch_dtype: Any = "auto",
        trust_remote_code: bool = False,
        safetensors: bool = True,
        device_map: Any = None,
        download_kwargs: Mapping[str, Any] | None = None,
        low_cpu_mem_usage: bool = True,
        use_cache: bool = False,
        **model_init_kwargs: Any,
    ) -> AWQModel:
        """See `AutoAWQForCausalLM.from_pretrained`; `model_type` has no effect."""
        answer({"safetensors": not safetensors, "low_cpu_mem_usage": not low_cpu_mem_usage})
        folder = resolve(model_path, options=download_kwargs)
        if read_json(folder / "config.json").get("quantization_config"):
            raise AlreadyQuantizedError(
                f"{folder} is quantized already: load it with AutoAWQForCausalLM.from_quantized, or start "
                "from the original weights"
            )
        CheckpointReader(folder)
        loading = {"dtype": torch_dtype, "device_map": device_map, **model_init_kwargs}
        if use_cache:  # False is for calibration, which builds no cache here
            loading["use_cache"] = True
        return cls(folder, trust_remote_code, loading, is_quantized=False)

    @classmethod
    def from_quantized(
        cls,
        model_path: str | Path,
        model_type: str | None = None,
        model_filename: str = "",
        max_seq_len: int | None = None,
        torch_dtype: Any = "auto",
        trust_remote_code: bool = False,
        safetensors: bool = True,
        fuse_layers: bool | None = None,
        use_exllama: bool = False,
        use_exllama_v2: bool = False,
        use_ipex: bool = False,
        device_map: Any = "balanced",
        max_memory: Any = None,
        offload_folder: str | None = None,
        download_kwargs: Mapping[str, Any] | None = None,
        **config_kwargs: Any,
    ) -> AWQModel:
        """See `AutoAWQForCausalLM.from_quantized`; `model_type` has no effect."""
        answer(
            {
                "safetensors": not safetensors,
                "max_seq_len": max_seq_len not in (None, _SEQ_LEN) and not fuse_layers,
                "use_exllama": use_exllama,
                "use_exllama_v2": use_exllama_v2,
                "use_ipex": use_ipex,
                "use_qbits": config_kwargs.pop("use_qbits", False),
                "max_new_tokens": config_kwargs.pop("max_new_tokens", None) is not None,
                "low_cpu_mem_usage": not config_kwargs.pop("low_cpu_mem_usage", True),
            }
        )
        folder = resolve(model_path, options=download_kwargs)
        if not read_json(folder / "config.json").get("quantization_config"):
            raise ConfigError(
                f"{folder} is a float model: load it with AutoAWQForCausalLM.from_pretrained and quantize it"
            )
        check_filename(folder, model_filename)
        offload = {"offload_folder": offload_folder} if offload_folder else {}
        placing = {"device_map": device_map, "max_memory": max_memory, **offload}
        model = cls(folder, trust_remote_code, {"dtype": torch_dtype, **placing, **config_kwargs}, True)
        loaded = model.model  # now: what is wrong with it should show here
        if fuse_layers:
            # Nobody asked for the default length, and without compilation a static cache costs time.
            unasked = max_seq_len == _SEQ_LEN and loaded.device.type == "cpu"
            fuse(loaded, None if unasked else max_seq_len)
        return model

    @property
    def quant_config(self) -> AwqConfig:
        """What the model was, or would be, quantized to, under AutoAWQ's names."""
        if self._quant_config is not None:
            return self._quant_config
        entry = read_json(self._place() / "config.json").get("quantization_config")
        return AwqConfig.from_entry(entry or {})

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: Mapping[str, Any] | QuantConfig | None = None,
        calib_data: Any = "pileval",
        split: str = "train",
        text_column: str = "text",
        duo_scaling: bool = True,
        export_compatible: bool = False,
        apply_clip: bool = True,
        n_parallel_calib_samples: int | None = None,
        max_calib_samples: int = 128,
        max_calib_seq_len: int = 512,
        max_chunk_memory: int = _CHUNK_MEMORY,
        quantizer_cls: Any = None,
        **kwargs: Any,
    ) -> None:
        """Quantize; the object is the quantized model from then on.

        The result waits in the system's temporary folder (`TMPDIR`) until `save_quantized` moves it.

        Args:
            tokenizer: the model's own by default; a processor serves too.
            quant_config: a `QuantConfig`, or AutoAWQ's dictionary (`w_bit`, `q_group_size`, `zero_point`,
                `version`, `modules_to_not_convert`).
            calib_data: as `awq.quantize` takes `calib`; AutoAWQ's default needs the network.
            split, text_column: of a data set. As in AutoAWQ, `pileval` is always its `validation` split.
            duo_scaling, apply_clip: parts of the search; a `QuantConfig` has its own.
            export_compatible: fold the scales and clip the weights, but round nothing: the model stays float,
                for another tool to quantize. `pack()` quantizes it later.
            n_parallel_calib_samples: samples run at once; from the free memory by default.
            max_calib_samples, max_calib_seq_len: calibration samples, and tokens of each at most; longer
                texts are cut in windows, where AutoAWQ left them out.
            max_chunk_memory: without effect.
            quantizer_cls: must be AutoAWQ's own class, or a derived one that only has `init_quant`, which
                is not called: the search cannot be replaced.
            **kwargs: `modules_to_not_convert`, and further arguments of `awq.quantize` (`device`, `progress`,
                `verify`, `max_shard_bytes`, …).

        Raises:
            AwqError: see `awq.quantize`.
        """
        if self.is_quantized:
            raise AlreadyQuantizedError("this model is quantized already; start from the original weights")
        check_quantizer(quantizer_cls)
        answer({"max_chunk_memory": max_chunk_memory != _CHUNK_MEMORY})
        export_compatible = kwargs.pop("gguf_compatible", False) or export_compatible  # its name before 0.2
        settings = read_settings(quant_config, kwargs.pop("modules_to_not_convert", None))
        settings = {"duo_scaling": duo_scaling, "clip": apply_clip, **settings}
        dtype = str(self._loading.get("dtype", "auto")).removeprefix("torch.")
        if dtype in ("float16", "bfloat16"):
            settings.setdefault("dtype", dtype)
        if n_parallel_calib_samples is not None:
            kwargs.setdefault("batch_tokens", n_parallel_calib_samples * max_calib_seq_len)
        device = accelerator_of(self._loading.get("device_map"))
        if device is not None:  # one block is in memory at a time, so one device is enough
            kwargs.setdefault("device", device)
        run = partial(
            quantize,
            calib=calib_data,
            tokenizer=tokenizer,
            split=None if isinstance(calib_data, str) and calib_data == "pileval" else split,
            text_column=text_column,
            samples=max_calib_samples,
            seq_len=max_calib_seq_len,
            trust_remote_code=self._trust,
            **kwargs,
        )
        version = take_version(settings)
        if export_compatible:
            self._quantize_again = partial(self._run, run, settings, version)
            # An intermediate result, of which nothing is rounded.
            self._run(partial(run, verify=False), settings, "folded")
            self._quant_config = dataclasses.replace(self.quant_config, version=version)
        else:
            self._run(run, settings, version)

    def _run(self, run: Callable[..., Report], settings: Mapping[str, Any], version: str) -> None:
        converted = version in _CONVERTED
        config = QuantConfig.from_dict({**settings, "format": "gemm" if converted else version})
        work = tempfile.TemporaryDirectory(prefix="awq-", ignore_cleanup_errors=True)
        result = Path(work.name) / "out"
        try:
            self.report = run(self._folder, result, config)
        except DiskFullError as error:
            raise DiskFullError(f"{error}; the environment variable TMPDIR names another place") from error
        self._work, self._result, self._model, self.is_quantized = work, result, None, True
        self._quant_config = AwqConfig.of(config)
        if converted:
            try:
                convert(result, result.with_name(version), version)
            except ConfigError as error:
                raise ConfigError(
                    f"{error}; the model is quantized all the same, and save_quantized writes it as gemm"
                ) from error
            shutil.rmtree(result)
            self._result = result.with_name(version)
            self._quant_config.version = version

    def pack(self) -> None:
        """Quantize what `quantize(export_compatible=True)` only folded.

        The search runs again on the original weights, so the result is the one that `quantize` gives without
        that argument. Does nothing when the model is packed already.

        Raises:
            ConfigError: nothing has been quantized.
        """
        if not self.is_quantized:
            raise ConfigError("there is nothing to pack: call quantize(…, export_compatible=True) first")
        if self._quantize_again is not None:
            self._quantize_again()
            self._quantize_again = None

    def save_quantized(
        self, save_dir: str | Path, safetensors: bool = True, shard_size: str | int = "5GB"
    ) -> None:
        """Write the quantized checkpoint, in place of an earlier one in that folder.

        Args:
            save_dir: a folder without a model, or with a checkpoint that was written here before.
            safetensors: written in any case.
            shard_size: of a weight file at most, in bytes or as text (`5GB`, `500MB`, `2GiB`).

        Raises:
            ConfigError: nothing has been quantized, or the size has no meaning.
            OutputExistsError: the folder holds another model.
        """
        answer({"safetensors": not safetensors})
        if not self.is_quantized:
            raise ConfigError("there is nothing to save: call quantize first")
        try:
            most = convert_file_size_to_int(shard_size)
        except ValueError as error:
            raise ConfigError(f"shard_size={shard_size!r} is no size; write 5GB, 500MB or 2GiB") from error
        out = Path(save_dir).expanduser()
        publish(self._place(), out, most, move=self._work is not None)
        if self._work is not None:
            self._result, work, self._work = out, self._work, None
            work.cleanup()

    @staticmethod
    def fuse_layers(model: Any) -> None:
        """Merge layers of a model that read the same tensor; a transformers model, or an object like this."""
        fuse(model.model if isinstance(model, FolderModel) else model)

    def __repr__(self) -> str:
        kind = "quantized" if self.is_quantized else "float"
        return f"{type(self).__name__}({str(self._place())!r}, {kind})"

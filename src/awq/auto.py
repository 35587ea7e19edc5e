"""`AutoAWQForCausalLM`: AutoAWQ's calls on OpenAWQ's pipeline. It holds no logic of its own.

`from_pretrained` opens a folder and reads no weights; they are read when the object is first used as a model.
`quantize` streams the folder to a working folder, and `save_quantized` puts the result where it belongs.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, NoReturn

from awq.config import QuantConfig
from awq.errors import AwqError, ConfigError, OutputExistsError
from awq.hf import load_quantized
from awq.model.fetch import resolve
from awq.model.weights import CheckpointReader, read_json
from awq.pipeline import Report, quantize

_NO_LONGER = {
    "export_compatible": "quantized checkpoints are exported with other tools from the finished folder",
    "n_parallel_calib_samples": "batches are sized from the free memory",
    "max_chunk_memory": "statistics take the memory of one matrix, whatever the number of tokens",
    "quantizer_cls": "the search is made of functions in awq.search",
    "use_exllama": "the kernel is chosen by device and shape",
    "use_exllama_v2": "the kernel is chosen by device and shape",
    "use_ipex": "the CPU kernel needs no further package",
    "fuse_layers": "layers are not fused yet",
    "max_seq_len": "the key/value cache grows as needed",
    "batch_size": "the key/value cache grows as needed",
    "low_cpu_mem_usage": "one block is in memory at a time",
}


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
        download_kwargs: dict[str, Any] | None = None,
        low_cpu_mem_usage: bool = True,
        use_cache: bool = False,
        **model_init_kwargs: Any,
    ) -> AWQModel:
        """Open a float model for quantization.

        Args:
            model_path: a folder, or a hub name.
            torch_dtype, device_map, model_init_kwargs: used if the object is called as a model.
            trust_remote_code: run modelling code that comes with the model (AutoAWQ's default was True).
            safetensors: must stay True; pickled weights can run code when opened.
            download_kwargs: `revision` is used.
            low_cpu_mem_usage, use_cache: accepted and without effect.

        Raises:
            AwqError: the folder is no complete float model.
        """
        if not safetensors:
            raise ConfigError("safetensors=False: pickled weights are not read; convert them to safetensors")
        folder = resolve(model_path, (download_kwargs or {}).get("revision"))
        read_json(folder / "config.json")
        CheckpointReader(folder)
        loading = {"dtype": torch_dtype, "device_map": device_map, **model_init_kwargs}
        return AWQModel(folder, trust_remote_code, loading)

    @staticmethod
    def from_quantized(
        quant_path: str | Path,
        quant_filename: str = "",
        max_seq_len: int = 2048,
        trust_remote_code: bool = False,
        fuse_layers: bool = False,
        use_exllama: bool = False,
        use_exllama_v2: bool = False,
        use_ipex: bool = False,
        batch_size: int = 1,
        safetensors: bool = True,
        device_map: Any = None,
        max_memory: Any = None,
        offload_folder: str | None = None,
        download_kwargs: dict[str, Any] | None = None,
        torch_dtype: Any = "auto",
        **config_kwargs: Any,
    ) -> AWQModel:
        """Load a quantized checkpoint, ready to generate.

        Args:
            quant_path: a folder, or a hub name.
            torch_dtype: of activations; the checkpoint's own by default.
            device_map, max_memory, offload_folder: as transformers takes them.
            trust_remote_code: run modelling code that comes with the model (AutoAWQ's default was True).
            quant_filename: must be empty; all safetensors files of the folder are read.
            max_seq_len, fuse_layers, use_exllama, use_exllama_v2, use_ipex, batch_size: accepted; those that
                ask for something that is chosen otherwise now warn once.

        Raises:
            AwqError: the checkpoint cannot be loaded whole.
        """
        if quant_filename or not safetensors:
            raise ConfigError("quant_filename and safetensors=False: the folder's safetensors files are read")
        asked = {"fuse_layers": fuse_layers, "use_exllama": use_exllama, "use_exllama_v2": use_exllama_v2}
        _warn([name for name, value in asked.items() if value])
        folder = resolve(quant_path, (download_kwargs or {}).get("revision"))
        extra = {"offload_folder": offload_folder} if offload_folder else {}
        loaded = load_quantized(
            folder,
            dtype=torch_dtype,
            device_map=device_map,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            **extra,
            **config_kwargs,
        )
        return AWQModel(folder, trust_remote_code, {}, loaded)


class AWQModel:
    """A model that can be quantized, saved, called and asked to generate."""

    def __init__(
        self, folder: Path, trust_remote_code: bool, loading: dict[str, Any], model: Any = None
    ) -> None:
        self._folder, self._trust, self._loading = folder, trust_remote_code, loading
        self._model = model
        self._work: tempfile.TemporaryDirectory[str] | None = None
        self.report: Report | None = None
        self.is_quantized = model is not None

    @property
    def model(self) -> Any:
        """The transformers model, loaded when first asked for."""
        if self._model is None:
            if self._work is not None:
                self._model = load_quantized(self._result(), trust_remote_code=self._trust)
            else:
                from transformers import AutoModelForCausalLM

                self._model = AutoModelForCausalLM.from_pretrained(
                    self._folder, trust_remote_code=self._trust, **self._loading
                ).eval()
        return self._model

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: dict[str, Any] | QuantConfig | None = None,
        calib_data: Any = "pileval",
        split: str | None = None,
        text_column: str = "text",
        duo_scaling: bool = True,
        export_compatible: bool = False,
        apply_clip: bool = True,
        n_parallel_calib_samples: int | None = None,
        max_calib_samples: int = 128,
        max_calib_seq_len: int = 512,
        max_chunk_memory: int | None = None,
        quantizer_cls: Any = None,
        **kwargs: Any,
    ) -> None:
        """Quantize; the object is the quantized model from then on.

        Args:
            tokenizer: the model's own by default.
            quant_config: a `QuantConfig`, or AutoAWQ's dictionary (`w_bit`, `q_group_size`, `zero_point`,
                `version`, `modules_to_not_convert`).
            calib_data: as `awq.quantize` takes `calib`; AutoAWQ's default needs the network.
            split, text_column: of a data set.
            duo_scaling, apply_clip: parts of the search.
            max_calib_samples, max_calib_seq_len: calibration samples, and tokens of each at most.
            export_compatible, n_parallel_calib_samples, max_chunk_memory, quantizer_cls: without effect.
            **kwargs: further arguments of `awq.quantize` (`device`, `progress`, …).

        Raises:
            AwqError: see `awq.quantize`.
        """
        if self.is_quantized:
            raise ConfigError("this model is quantized already; start from the original weights")
        given = {
            "export_compatible": export_compatible,
            "n_parallel_calib_samples": n_parallel_calib_samples,
            "max_chunk_memory": max_chunk_memory,
            "quantizer_cls": quantizer_cls,
        }
        _warn([name for name, value in given.items() if value])
        work = tempfile.TemporaryDirectory(prefix="awq-", ignore_cleanup_errors=True)
        self.report = quantize(
            self._folder,
            Path(work.name) / "out",
            _config(quant_config, duo_scaling, apply_clip),
            calib_data,
            tokenizer=tokenizer,
            split=split,
            text_column=text_column,
            samples=max_calib_samples,
            seq_len=max_calib_seq_len,
            trust_remote_code=self._trust,
            **kwargs,
        )
        self._work, self._model, self.is_quantized = work, None, True

    def save_quantized(self, save_dir: str | Path, safetensors: bool = True, shard_size: str = "5GB") -> None:
        """Write the quantized checkpoint.

        Args:
            save_dir: the folder to make.
            safetensors: must stay True.
            shard_size: accepted; files hold at most 5 GB as they were written.

        Raises:
            ConfigError: nothing has been quantized.
            OutputExistsError: the folder holds something.
        """
        if not safetensors:
            raise ConfigError("safetensors=False: only safetensors are written")
        if self._work is None:
            raise ConfigError("there is nothing to save: call quantize first")
        out = Path(save_dir).expanduser()
        if out.exists() and any(out.iterdir()):
            raise OutputExistsError(f"{out} holds something; choose another folder")
        shutil.copytree(self._result(), out, dirs_exist_ok=True)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the transformers model."""
        return self.model.generate(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformers model's output."""
        return self.model(*args, **kwargs)

    __call__ = forward

    def _result(self) -> Path:
        if self._work is None:
            raise AwqError("nothing has been quantized yet")
        return Path(self._work.name) / "out"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.model, name)


def _config(given: dict[str, Any] | QuantConfig | None, duo_scaling: bool, apply_clip: bool) -> QuantConfig:
    if isinstance(given, QuantConfig):
        return given
    return QuantConfig.from_dict({"duo_scaling": duo_scaling, "clip": apply_clip, **(given or {})})


def _warn(names: list[str]) -> None:
    for name in names:
        warnings.warn(f"{name} has no effect: {_NO_LONGER[name]}", stacklevel=3)

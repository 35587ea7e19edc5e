"""AutoAWQ's configuration object: the same facts as `QuantConfig`, under AutoAWQ's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awq.config import QuantConfig
from awq.legacy.arguments import take_version
from awq.model.fetch import resolve
from awq.model.weights import read_json


@dataclasses.dataclass
class AwqConfig:
    """What `model.quant_config` is; `QuantConfig` is what the work is done with.

    Args:
        quant_method: `awq`.
        zero_point: asymmetric codes.
        q_group_size: input channels that share a scale.
        w_bit: width of a code.
        version: on-disk layout.
        modules_to_not_convert: names, or parts of names, of layers left as they were.
    """

    quant_method: str = "awq"
    zero_point: bool = True
    q_group_size: int = 128
    w_bit: int = 4
    version: str = "gemm"
    modules_to_not_convert: list[str] | None = None

    @classmethod
    def of(cls, config: QuantConfig) -> AwqConfig:
        """The same settings as ours."""
        return cls(
            zero_point=config.zero_point,
            q_group_size=config.group_size,
            w_bit=config.bits,
            version=config.format,
            modules_to_not_convert=list(config.modules_to_not_convert) or None,
        )

    @classmethod
    def from_dict(cls, quant_config: Mapping[str, Any] | None = None) -> AwqConfig:
        """Read AutoAWQ's dictionary (or ours); an empty one is all defaults.

        Raises:
            ConfigError: an option is unknown or has no meaning.
        """
        settings = dict(quant_config or {})
        version = take_version(settings)
        return dataclasses.replace(cls.of(QuantConfig.from_dict(settings)), version=version)

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, **kwargs: Any) -> AwqConfig:
        """Read a checkpoint's `config.json`; all defaults when it says nothing of a quantization.

        Args:
            save_dir: a folder, or a hub name.
            **kwargs: `revision`; others have no effect on a folder.

        Raises:
            MissingFileError: there is no such folder, or it has no config.json.
        """
        entry = read_json(resolve(save_dir, kwargs.get("revision")) / "config.json").get(
            "quantization_config"
        )
        return cls.from_entry(entry or {})

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> AwqConfig:
        """Read the `quantization_config` of a checkpoint, ours or an older one of AutoAWQ's."""
        names = {"group_size": "q_group_size", "bits": "w_bit"}
        fields = {field.name for field in dataclasses.fields(cls)}
        given = {names.get(key, key): value for key, value in entry.items()}
        return cls(**{key: value for key, value in given.items() if key in fields})

    def to_dict(self) -> dict[str, Any]:
        """AutoAWQ's dictionary, which `quantize` takes."""
        out = dataclasses.asdict(self)
        del out["quant_method"]
        return out

    def to_transformers_dict(self) -> dict[str, Any]:
        """The `quantization_config` entry of a checkpoint."""
        return {
            "quant_method": self.quant_method,
            "zero_point": self.zero_point,
            "group_size": self.q_group_size,
            "bits": self.w_bit,
            "version": self.version.lower(),
            "modules_to_not_convert": self.modules_to_not_convert,
        }

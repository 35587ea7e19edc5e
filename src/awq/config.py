"""What to quantize to: one frozen value, checked when it is made.

`QuantConfig` travels to disk as the `quantization_config` entry of a checkpoint's `config.json`. Only the
fields that inference engines read are written there; how the codes were searched for is told in the report
beside the checkpoint instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from awq.errors import ConfigError

Format = Literal["gemm", "compressed-tensors", "mlx", "gptq", "gptq_v2", "float", "folded"]
Method = Literal["awq", "rtn"]
Rounding = Literal["auto", "nearest", "gptq"]
StorageDtype = Literal["auto", "float16", "bfloat16", "float32"]

# What each layout can hold. `float` writes the dequantized weights: a research format for any width. `folded`
# writes the scaled and clipped weights before any rounding, for another tool to quantize. compressed-tensors
# has more widths, but its versions disagree about codes that do not fill a word evenly.
FORMAT_BITS: dict[str, tuple[int, ...]] = {
    "gemm": (4,),
    "compressed-tensors": (2, 4, 8),
    "mlx": (2, 3, 4, 5, 6, 8),
    "gptq": (2, 3, 4, 8),
    "gptq_v2": (2, 3, 4, 8),
    "float": (2, 3, 4, 5, 6, 7, 8),
    "folded": (2, 3, 4, 5, 6, 7, 8),
}
# Layouts of plain weights: every loader reads them, and their config.json speaks of no quantization.
PLAIN_FORMATS = ("float", "folded")

# What the presets change from the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"rounding": "nearest", "correction": False},
    "balanced": {},
    "best": {"refine": 4, "tune": 160, "correction": False},
}

# AutoAWQ's names for the same things, as found in its scripts and in older checkpoints.
_AUTOAWQ_NAMES = {"w_bit": "bits", "q_group_size": "group_size", "version": "format"}


class Setting(NamedTuple):
    """How one layer is quantized: width of a code, and input channels that share a scale (-1: the row)."""

    bits: int
    group_size: int

    def size(self, in_features: int) -> int:
        """`group_size`, with -1 read as the whole row."""
        return in_features if self.group_size == -1 else self.group_size


def _choices(alias: Any) -> tuple[str, ...]:
    return get_args(alias)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized.

    Args:
        bits: width of a code; `FORMAT_BITS` tells what each layout holds (`gemm`: 4 alone).
        group_size: input channels that share a scale and a zero point; -1 for the whole row.
        zero_point: asymmetric codes; without, every zero point is the middle code.
        format: on-disk layout: `gemm` (AutoAWQ's, read by vLLM, SGLang, transformers, mlx-lm),
            `compressed-tensors`, `mlx`, `gptq`, `gptq_v2`, or plain weights with no `quantization_config`:
            `float` (they hold the quantized values) or `folded` (scales folded in and ranges clipped, but
            nothing rounded: for another tool to quantize).
        modules_to_not_convert: names, or parts of names, of layers to leave as they are.
        method: `awq` (search scales and clips) or `rtn` (plain rounding to nearest).
        rounding: `nearest`, `gptq` (error compensation), or `auto`: `gptq`, and where that does not better
            than plain rounding, block by block, `nearest` is tried too.
        scale_steps: points of the scale search between no scaling and full scaling.
        duo_scaling: also try scales that take the weights' magnitude into account.
        clip: search a narrower range for each group.
        dtype: of the float tensors written: `auto` keeps each one's own; `float32` is for plain weights.
        correction: change each weight, before it is rounded, so that it makes up for what layers quantized
            before it have left wrong.
        refine: how often scales are refitted and codes improved after error compensation; 0 for never.
        tune: steps of gradient tuning of each block as a whole, behind all that; 0 for none. Slow.
        target_bits: choose for each layer what it is quantized to, or leave it float, so that a weight takes
            so many bits on disk on average, scales included; None to quantize all layers alike.

    Raises:
        ConfigError: a value has no meaning, or values contradict one another.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    format: Format = "gemm"
    modules_to_not_convert: tuple[str, ...] = ()
    method: Method = "awq"
    rounding: Rounding = "auto"
    scale_steps: int = 20
    duo_scaling: bool = True
    clip: bool = True
    dtype: StorageDtype = "auto"
    correction: bool = True
    refine: int = 2
    tune: int = 0
    target_bits: float | None = None

    def __post_init__(self) -> None:
        for name, alias in (
            ("format", Format),
            ("method", Method),
            ("rounding", Rounding),
            ("dtype", StorageDtype),
        ):
            value = getattr(self, name)
            if value not in _choices(alias):
                raise ConfigError(f"{name}={value!r} is unknown; choose one of: {', '.join(_choices(alias))}")
        for name in ("bits", "group_size", "scale_steps", "refine", "tune"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} must be a whole number, not {value!r}")
        if self.bits not in FORMAT_BITS[self.format]:
            supported = ", ".join(map(str, FORMAT_BITS[self.format]))
            others = [name for name, widths in FORMAT_BITS.items() if self.bits in widths]
            cure = f"; {self.bits} bits fit into: {', '.join(others)}" if others else ""
            raise ConfigError(f"bits={self.bits}: the {self.format!r} format holds {supported} bits{cure}")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise ConfigError(
                f"group_size={self.group_size} is not possible; use a multiple of 8 (32, 64 and 128 run on "
                "every engine) or -1 for one group per row"
            )
        if self.dtype == "float32" and self.format not in PLAIN_FORMATS:
            raise ConfigError(f"dtype=float32: the {self.format!r} format stores 16-bit scales")
        self._check_zero_points()
        self._check_target()
        for name, least in (("scale_steps", 1), ("refine", 0), ("tune", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        # Lists arrive from JSON and from callers; a frozen value holds a tuple.
        skipped = self.modules_to_not_convert or ()
        # An empty name would be part of every other.
        if isinstance(skipped, str) or not all(isinstance(name, str) and name for name in skipped):
            raise ConfigError(f"modules_to_not_convert must be a list of names, not {skipped!r}")
        object.__setattr__(self, "modules_to_not_convert", tuple(skipped))

    def _check_zero_points(self) -> None:
        if self.zero_point and self.format == "gptq":
            raise ConfigError(
                "the first GPTQ format cannot hold a zero point of 0, which asymmetric codes may have: use "
                "format='gptq_v2', or zero_point=False"
            )
        if self.format == "mlx" and self.bits == 8 and self.dtype == "bfloat16":
            raise ConfigError(
                "mlx stores zero * scale, and with 8 bits bfloat16 is too coarse for that; use float16"
            )

    def _check_target(self) -> None:
        target = self.target_bits
        if target is None:
            return
        if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < math.inf:
            raise ConfigError(f"target_bits must be a number above 0, not {target!r}")
        if self.format == "folded":
            raise ConfigError("target_bits has no meaning for format='folded', where nothing is rounded")

    @classmethod
    def preset(cls, name: str, **options: Any) -> QuantConfig:
        """A preset, with further options.

        Args:
            name: `fast` (scales and ranges only), `balanced` (the default), or `best` (slow).

        Raises:
            ConfigError: there is no such preset, or an option has no meaning.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset={name!r} is unknown; choose one of: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **options})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """Read our own names, AutoAWQ's (`w_bit`, `q_group_size`, `version`), or a checkpoint's entry.

        Raises:
            ConfigError: a name is unknown, or belongs to another quantization method.
        """
        method = values.get("quant_method", "awq")
        if method != "awq":
            raise ConfigError(f"quant_method={method!r} is not an AWQ checkpoint")
        known = {field.name for field in dataclasses.fields(cls)}
        out: dict[str, Any] = {}
        for key, value in values.items():
            name = _AUTOAWQ_NAMES.get(key, key)
            if key in ("quant_method", "backend") or value is None:
                continue
            if name not in known:
                raise ConfigError(
                    f"unknown option {key!r}; known are: {', '.join(sorted(known | set(_AUTOAWQ_NAMES)))}"
                )
            out[name] = value.lower() if name == "format" and isinstance(value, str) else value
        return cls(**out)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON values."""
        return dataclasses.asdict(self) | {"modules_to_not_convert": list(self.modules_to_not_convert)}

    def to_hf(self, modules_to_not_convert: list[str]) -> dict[str, Any]:
        """The `quantization_config` entry that engines read.

        Args:
            modules_to_not_convert: full paths of every layer left as float.
        """
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            # The tensors hold zero points, also where each is the middle code.
            "zero_point": True,
            "version": self.format,
            "modules_to_not_convert": modules_to_not_convert,
        }

    @property
    def setting(self) -> Setting:
        """How a layer is quantized, unless something else is chosen for it."""
        return Setting(self.bits, self.group_size)

    def groups(self, in_features: int) -> int:
        """Groups per row of a layer with this many input channels (0 when they do not divide)."""
        size = self.effective_group_size(in_features)
        return in_features // size if in_features % size == 0 else 0

    def effective_group_size(self, in_features: int) -> int:
        """`group_size`, with -1 read as the whole row."""
        return in_features if self.group_size == -1 else self.group_size

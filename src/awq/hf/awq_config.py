"""`transformers.AwqConfig`, taught to take what AutoAWQ's users write.

The stock class drops AutoAWQ's options silently, raises on most of its versions, and saves fields of GPTQ
that contradict the checkpoint (`sym: true`). Users hold the class itself, so its methods are replaced in
place, and `restore` puts the originals back. Every option is honoured, or answered with one sentence.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from awq.errors import ConfigError

# Versions that name a kernel of AutoAWQ's; their files are in the GEMM layout.
_KERNEL_VERSIONS = ("exllama", "ipex")
# gptqmodel's names for plain PyTorch, which is a kernel here too.
_KERNEL_OF_BACKEND = {"torch_awq": "torch", "torch_fused_awq": "torch"}
_AUTOMATIC = ("auto", "auto_trainable", "autoawq", "llm-awq")
_FOREIGN_BACKENDS = (
    *("exllama", "exllama_v1", "exllama_v2", "ipex", "machete"),
    *("gemm", "gemm_triton", "gemv", "gemv_fast"),
)
_FUSING = ("do_fuse", "fuse_max_seq_len", "modules_to_fuse")
# What a checkpoint may hold that means nothing to a reader of AWQ: AutoAWQ's loading options, and what
# transformers adds when it saves.
_NOT_KEPT = (*_FUSING, "exllama_config", "checkpoint_format", "format", "version", "backend", "quant_method")
_OLD_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}

# The stock constructor, once it has been replaced.
_stock_init: list[Any] = []


def extend(cls: type) -> dict[str, Any]:
    """Replace methods of transformers' class; returns what `restore` takes."""
    stock = {name: cls.__dict__.get(name) for name in _METHODS}
    _stock_init.append(stock["__init__"])
    for name, method in _METHODS.items():
        setattr(cls, name, method)
    return stock


def restore(cls: type, stock: dict[str, Any]) -> None:
    """Undo `extend`."""
    for name, method in stock.items():
        if method is None:
            delattr(cls, name)
        else:
            setattr(cls, name, method)


def _init(
    self: Any,
    bits: int = 4,
    group_size: int = 128,
    zero_point: bool = True,
    backend: Any = "auto",
    modules_to_not_convert: list[str] | None = None,
    **kwargs: Any,
) -> None:
    """As transformers documents it; AutoAWQ's `version`, `do_fuse`, `exllama_config`, … are taken too."""
    # A checkpoint's entry names its method; what a user constructs does not.
    of_checkpoint = "quant_method" in kwargs
    sizes = {"bits": bits, "group_size": group_size}
    sizes.update({new: kwargs.pop(old) for old, new in _OLD_NAMES.items() if old in kwargs})
    version = kwargs.get("version") or kwargs.get("format") or "gemm"
    version = str(getattr(version, "value", version)).lower()
    backend = str(getattr(backend, "value", backend) or "auto").lower()
    if backend == "llm-awq":
        version = "llm-awq"
    known = _parameters()
    stock = {name: value for name, value in kwargs.items() if name in known and name not in _NOT_KEPT}
    _stock_init[-1](
        self, zero_point=zero_point, modules_to_not_convert=modules_to_not_convert, **sizes, **stock
    )
    self.format = version if of_checkpoint and version not in _KERNEL_VERSIONS else "gemm"
    self.backend = _kernel(backend, quiet=of_checkpoint)
    # What a checkpoint was made with is nobody's request here either.
    self.do_fuse, self.fuse_max_seq_len = (False, None) if of_checkpoint else _fusing(kwargs)
    extra = {name: value for name, value in kwargs.items() if name not in known and name not in _NOT_KEPT}
    self.extra_fields = extra if of_checkpoint else {}
    if not of_checkpoint:
        _answer(version, kwargs, sorted(extra))


def _parameters() -> set[str]:
    """Names that the stock class and its parent take."""
    init = _stock_init[-1]
    parent = inspect.signature(init.__globals__["GPTQConfig"].__init__).parameters
    return set(parent) | set(inspect.signature(init).parameters)


def _kernel(backend: str, quiet: bool) -> str:
    """The kernel that is asked for, or `auto`; what a checkpoint was made with is nobody's request."""
    from awq.kernels import kernel_choices

    backend = _KERNEL_OF_BACKEND.get(backend, backend)
    if backend in _AUTOMATIC:
        return "auto"
    if backend in kernel_choices():
        return backend
    if quiet:
        return "auto"
    if backend not in _FOREIGN_BACKENDS:
        raise ConfigError(
            f"backend={backend!r} is unknown; OpenAWQ's kernels are: {', '.join(kernel_choices())}, "
            "and `auto` takes the fastest that fits"
        )
    _warn(
        f"backend={backend!r} is a kernel of another package; OpenAWQ takes the fastest of its own that fits "
        f"each layer (to insist on one, name it: {', '.join(kernel_choices())})"
    )
    return "auto"


def _fusing(given: dict[str, Any]) -> tuple[bool, int | None]:
    """Whether layers shall be merged, and the length of a static cache; either option asks for fusing."""
    length = given.get("fuse_max_seq_len")
    if length is not None and (not isinstance(length, int) or length < 1):
        raise ConfigError(f"fuse_max_seq_len={length!r} is no number of tokens; leave it out, or give one")
    asked = given.get("do_fuse")
    if asked is None:
        asked = bool(length or given.get("modules_to_fuse"))
    return bool(asked), length if asked else None


def _answer(version: str, given: dict[str, Any], unknown: list[str]) -> None:
    """Tell a user what becomes of options that do nothing here."""
    if version != "gemm":
        meant = "kernel is chosen by device and shape" if version in _KERNEL_VERSIONS else "layout is its own"
        _warn(f"version={version!r} has no effect on a checkpoint that is loaded: its {meant}")
    if given.get("modules_to_fuse"):
        _warn("modules_to_fuse names nothing here: layers that read the same tensor are found and merged")
    if given.get("fuse_max_seq_len") and given.get("do_fuse") is False:
        _warn("fuse_max_seq_len has no effect with do_fuse=False")
    if given.get("exllama_config"):
        _warn("exllama_config has no effect: the kernel is chosen by device and shape")
    rest = [name for name in unknown if name not in _FUSING and name != "exllama_config"]
    if rest:
        _warn(f"AwqConfig does not know {', '.join(rest)}: ignored")


def _warn(text: str) -> None:
    # The caller of AwqConfig(…), through _kernel or _answer and __init__.
    warnings.warn(text, stacklevel=4)


def _to_dict(self: Any) -> dict[str, Any]:
    """The `quantization_config` entry: what engines read, and what the checkpoint said besides."""
    entry = {
        "quant_method": "awq",
        "bits": self.bits,
        "group_size": self.group_size,
        "zero_point": self.zero_point,
        "version": str(getattr(self.format, "value", self.format)),
    }
    if self.modules_to_not_convert is not None:
        entry["modules_to_not_convert"] = list(self.modules_to_not_convert)
    return entry | getattr(self, "extra_fields", {})


def _loading_attributes(self: Any) -> dict[str, Any]:
    """What a user's configuration overrides in a checkpoint's."""
    return {name: getattr(self, name) for name in ("backend", "do_fuse", "fuse_max_seq_len")}


_METHODS = {"__init__": _init, "to_dict": _to_dict, "get_loading_attributes": _loading_attributes}

"""Two accelerators that are not there: tensors that say they are on `fake:0` or `fake:1`, and have their
values on the CPU.

An operation on tensors of different devices is an error, as it is on real ones, so a model that is split over
both runs only if each part of it is where its inputs are; and what it computes can be compared. A process
that has called `install` has them until it ends.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OnGpu(Tensor):
    """A tensor whose values are `value`, on the CPU, and which says that it is on a GPU."""

    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor, device: torch.device | None = None, **ignored: Any) -> OnGpu:
        value, device = getattr(value, "value", value), value.device if device is None else device
        out = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=device
        )
        out.value = value
        if "requires_grad" in ignored:  # as `torch.nn.Parameter` is called
            out._is_param = True
        return out

    def __repr__(self) -> str:
        return f"OnGpu({self.value!r}, {self.device})"

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, shape = tree_flatten((args, kwargs))
    tensors = [part for part in flat if isinstance(part, Tensor)]
    # Numbers in tensors may be anywhere, as on a GPU.
    devices = {part.device for part in tensors if part.dim() or part.device.type == "fake"}
    if len(devices) > 1 and func not in _MOVES:
        raise RuntimeError(f"{func}: tensors on {', '.join(sorted(map(str, devices)))}")
    device = next(iter(devices), torch.device("cpu"))
    if func is torch.ops.aten.copy_.default:
        device = args[0].device
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        if device.type == "fake":
            shape_of = {"device": torch.device("cpu"), "pin_memory": None}
            flat, shape = tree_flatten((args, kwargs | {k: v for k, v in shape_of.items() if k in kwargs}))
    wrappers = {id(part.value): part for part in flat if isinstance(part, OnGpu)}
    plain_args, plain_kwargs = tree_unflatten(
        [part.value if isinstance(part, OnGpu) else part for part in flat], shape
    )
    out = func(*plain_args, **plain_kwargs)

    def wrapped(part: Any) -> Any:
        if not isinstance(part, Tensor) or device.type != "fake":
            return part
        known = wrappers.get(id(part))
        return OnGpu(part, device) if known is None or known.device != device else known

    return tree_map(wrapped, out)


class _Module:
    """What `torch.fake` answers."""

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _lazy_init(self) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 2

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.memory, self.memory

    def memory_reserved(self, device: Any = None) -> int:
        return 0

    memory_allocated = memory_reserved

    def empty_cache(self) -> None: ...


# `torch.tensor` and indexing by lists make tensors past any mode.
_library = torch.library.Library("aten", "IMPL")


def install(memory: int = 2**33) -> None:
    """Have `fake:0` and `fake:1`, with as much memory each, in bytes."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a mode is a thread's own
    torch.__future__.set_swap_module_params_on_conversion(True)  # or parameters would lose their values
    backend_registration._setup_privateuseone_for_python_backend("fake", _Module(memory))
    for name in ("empty_strided", "copy_"):
        packet = getattr(torch.ops.aten, name).default
        _library.impl(name, lambda *args, _op=packet, **kwargs: _run(_op, args, kwargs), "PrivateUse1")
    _Mode().__enter__()

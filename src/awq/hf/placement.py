"""Which part of a model goes where: maps and limits that cannot work are refused before anything is loaded.

`device_map` and `max_memory` are transformers' and accelerate's. What is wrong with one they report late and
in the words of some tensor, or not at all: a part without a place stays behind, and a block whose parts are
on two devices fails when it is first used.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int

from awq.errors import ConfigError


def check_map(model: Any, device_map: Any) -> None:
    """Refuse a map that names what is not there, leaves something out, or tears a block apart.

    Args:
        model: a transformers model, which needs no weights yet.
        device_map: as transformers takes it; what is no dictionary, transformers makes into one that works.

    Raises:
        ConfigError: naming the part, and what to write.
    """
    if not isinstance(device_map, Mapping):
        return
    keys = set(model.state_dict())
    parts = keys | {name for name, _ in model.named_modules()}
    for part, device in device_map.items():
        if part not in parts:
            near = difflib.get_close_matches(part, parts, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"device_map: {type(model).__name__} has no part {part!r}{hint}")
        _check_device(f"device_map, {part!r}" if part else "device_map", device)
    places = {part: _name(device) for part, device in device_map.items()}
    tied = getattr(model, "all_tied_weights_keys", {})
    homeless = sorted(
        key for key in keys if _nearest(key, places) is None and _nearest(tied.get(key, key), places) is None
    )
    if homeless:
        more = f" and {len(homeless) - 3} more" if len(homeless) > 3 else ""
        raise ConfigError(f"device_map gives no place to {', '.join(homeless[:3])}{more}")
    _check_tied(tied, places)
    _check_nesting(places)
    _check_blocks(model, places)


def check_memory(max_memory: Any) -> None:
    """Refuse limits that name no device here or are no sizes.

    Raises:
        ConfigError: naming the limit.
    """
    if max_memory is None:
        return
    if not isinstance(max_memory, Mapping):
        raise ConfigError(
            f'max_memory={max_memory!r} is no dictionary of limits, such as {{0: "20GiB", "cpu": "60GiB"}}'
        )
    for device, limit in max_memory.items():
        if not isinstance(device, int) and device not in ("cpu", "disk", "mps"):
            raise ConfigError(
                f'max_memory: {device!r} is no device; GPUs are numbers, others "cpu" and "disk"'
            )
        _check_device("max_memory", device)
        try:
            convert_file_size_to_int(limit)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"max_memory: {limit!r} for {device!r} is no size; write a number of bytes, or 20GiB"
            ) from error


def is_spread(model: Any) -> bool:
    """Whether a loaded model is on several devices, or offloaded."""
    places = set(map(_name, (getattr(model, "hf_device_map", None) or {}).values()))
    return len(places) > 1 or "disk" in places


def accelerator_of(device_map: Any) -> str | None:
    """The first GPU that a map names, as `cuda:1`; None where it leaves the choice open or names none."""
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for device in devices:
        if isinstance(device, torch.device) or (isinstance(device, int) and not isinstance(device, bool)):
            name = _name(device)
        elif isinstance(device, str) and device.partition(":")[0] in ("cuda", "xpu", "mps"):
            name = device
        else:
            continue
        if name not in ("cpu", "meta"):
            return name
    return None


def _check_device(where: str, device: Any) -> None:
    """Refuse a device that is not there."""
    count = torch.accelerator.device_count()
    told = f"PyTorch sees {count}, which count from 0" if count else "PyTorch sees no GPU"
    if isinstance(device, int):
        if not 0 <= device < count:
            raise ConfigError(f"{where}: there is no GPU {device} here; {told}")
        return
    if device == "disk":
        return
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{where}: {device!r} is no device; write a number, cuda:0, cpu or disk") from error
    accelerator = torch.accelerator.current_accelerator() if count else None
    known = place.type in ("cpu", "meta") or (accelerator is not None and place.type == accelerator.type)
    if not known or (place.index or 0) >= max(count, 1):
        raise ConfigError(f"{where}: there is no {device} here; {told}")


def _name(device: Any) -> str:
    """One name for one device: 0, "cuda" and "cuda:0" are the same."""
    if device == "disk":
        return "disk"
    if isinstance(device, int):
        accelerator = torch.accelerator.current_accelerator()
        return f"{accelerator.type if accelerator is not None else 'cuda'}:{device}"
    place = torch.device(device)
    return place.type if place.type in ("cpu", "meta", "mps") else f"{place.type}:{place.index or 0}"


def _nearest(name: str, places: Mapping[str, str]) -> str | None:
    """The named part that a tensor or module is in, or is."""
    while name not in places:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def _gpus(places: Mapping[str, str]) -> list[str]:
    return sorted(set(places.values()) - {"cpu", "disk"})


def _computing(places: Mapping[str, str]) -> dict[str, str]:
    """The device that computes with each part. What lies aside is brought to one of the GPUs: accelerate
    chooses it from a set, so with several of them nobody knows which."""
    gpus = _gpus(places) or ["cpu"]
    main = gpus[0] if len(gpus) == 1 else "whichever GPU offloaded parts are brought to"
    return {part: main if device in ("cpu", "disk") else device for part, device in places.items()}


def _check_tied(tied: Mapping[str, str], places: Mapping[str, str]) -> None:
    """Refuse two devices for one tensor: accelerate would leave it on one of them."""
    computing = _computing(places)
    for name, source in tied.items():
        parts = _nearest(name, places), _nearest(source, places)
        if None not in parts and len({computing[part] for part in parts if part is not None}) > 1:
            raise ConfigError(
                f"device_map puts {parts[0]!r} and {parts[1]!r} on two devices, and their weights are one "
                "tensor: put both on one"
            )


def _check_nesting(places: Mapping[str, str]) -> None:
    """Refuse what accelerate cannot do: to move a part in and out of what is placed as a whole."""
    aside = ("cpu", "disk") if _gpus(places) else ("disk",)
    for part, device in places.items():
        holder = _nearest(part.rpartition(".")[0], places) if part else None
        if holder is not None and (device in aside) != (places[holder] in aside):
            raise ConfigError(
                f"device_map puts {part!r} on {device}, and {holder!r}, which holds it, as a whole on "
                f"{places[holder]}: name the other parts instead of what holds them all"
            )


def _check_blocks(model: Any, places: Mapping[str, str]) -> None:
    """Refuse a block whose parts compute on several devices: what they give could not be added up."""
    classes = getattr(model, "_no_split_modules", None) or ()
    computing = _computing(places)
    for path, module in model.named_modules():
        if type(module).__name__ not in classes:
            continue
        parts = {_nearest(f"{path}.{key}", computing) for key in module.state_dict()}
        devices = sorted({computing[part] for part in parts if part is not None})
        if len(devices) > 1:
            raise ConfigError(
                f"device_map splits {path} over {' and '.join(devices)}; a {type(module).__name__} adds up "
                "what its parts give: put it on one device as a whole"
            )

"""A model without its weights: the modules on the meta device, and where each tensor lies on disk.

Buffers that no checkpoint holds (rotary frequencies, scale factors) are real, since they are computed when
the modules are made. Everything is float32 from here on: statistics and proofs are exact enough on any
device, and no activation overflows.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import AlreadyQuantizedError, CorruptFileError, StructureError
from awq.model.classes import auto_class
from awq.model.conv1d import straighten
from awq.model.names import match_names
from awq.model.unfuse import unfuse
from awq.model.weights import FLOAT_DTYPES, CheckpointReader, read_json


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model folder, opened.

    Args:
        folder: the model folder.
        config: transformers' configuration object.
        raw_config: `config.json` as it stands.
        model: the module tree, parameters on the meta device.
        reader: the checkpoint's tensors.
        keys: `{parameter or buffer name in the model: checkpoint key}`; tied names share a key.
        transposed: checkpoint keys of weights of linear layers that are stored `[in, out]`.
    """

    folder: Path
    config: Any
    raw_config: dict[str, Any]
    model: nn.Module
    reader: CheckpointReader
    keys: dict[str, str]
    transposed: frozenset[str] = frozenset()

    @property
    def vocabulary(self) -> int:
        """Rows of the input embeddings: token ids must be below it."""
        embeddings: Any = self.model.get_input_embeddings
        return int(embeddings().weight.shape[0])

    @property
    def context(self) -> int | None:
        """Most tokens that the model is made for; None where its configuration does not tell."""
        found = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    @property
    def placeholders(self) -> Tensor:
        """Ids of the tokens that stand for images, sounds and the like, int64 `[n]`."""
        named = {
            value
            for name, value in self.config.to_dict().items()
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
        }
        text = self.config.get_text_config()
        plain = {getattr(text, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "sep")}
        return torch.tensor(sorted(named - plain), dtype=torch.long)

    def unused(self) -> list[str]:
        """Checkpoint keys of tensors that the model class has no place for (MTP heads and the like)."""
        state = self.model.state_dict()
        used = {key for name, key in self.keys.items() if name in state}
        return sorted(set(self.reader.tensors) - used)

    def load(self, module: nn.Module, prefix: str, device: torch.device) -> None:
        """Read the weights of `module`, whose name in the model is `prefix`, as float32 on `device`."""
        pairs = [(f"{prefix}.{path}".rstrip("."), child) for path, child in module.named_modules()]
        self.load_modules(pairs, device)

    def load_modules(self, modules: Sequence[tuple[str, nn.Module]], device: torch.device) -> None:
        """Read the weights that these modules own themselves, not their children's.

        Args:
            modules: `(name in the model, module)`.
            device: where the float32 weights go.
        """
        wanted: dict[str, list[tuple[nn.Module, str, bool]]] = {}
        for path, module in modules:
            for name, _, is_parameter in _own_tensors(module):
                key = self.keys.get(f"{path}.{name}".lstrip("."))
                if key is not None:
                    wanted.setdefault(key, []).append((module, name, is_parameter))
        for key, tensor in self.reader.read(list(wanted)):
            tensor = self.turned(key, tensor)
            for module, name, is_parameter in wanted[key]:
                if not is_parameter:
                    module._buffers[name] = tensor.to(device)
                    continue
                value = tensor.to(device=device, dtype=torch.float32)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for _, module in modules:
            # Buffers that no checkpoint holds were computed with the module; they only need to move.
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def turned(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on its way from the checkpoint to the model, or back."""
        return tensor.t().contiguous() if key in self.transposed else tensor

    def unload(self, module: nn.Module) -> None:
        """Send the parameters of `module` and its children to the meta device, freeing their memory."""
        for child in module.modules():
            self.unload_own(child)

    @staticmethod
    def unload_own(module: nn.Module) -> None:
        """Send the parameters that `module` itself owns to the meta device."""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def open_model(folder: Path, trust_remote_code: bool = False) -> Skeleton:
    """Open a model folder for quantization; no weights are read.

    Raises:
        MissingFileError, CorruptFileError: the folder is no complete model.
        AlreadyQuantizedError: its config names a quantization method.
        StructureError: the model's tensors cannot be streamed one by one.
    """
    raw = read_json(folder / "config.json")
    entry = raw.get("quantization_config")
    if entry:
        method = entry.get("quant_method", "some method") if isinstance(entry, dict) else entry
        raise AlreadyQuantizedError(
            f"{folder} is quantized already ({method}); start from the original weights"
        )
    reader = CheckpointReader(folder)
    _refuse_unread_code(folder, raw, trust_remote_code)
    config, model = build(folder, trust_remote_code)
    keys, merges = match_names(model, reader.tensors)
    converted = unfuse(model, keys, merges, reader)
    if converted:
        raise StructureError(
            f"{folder}: {len(converted)} tensors such as {converted[0]} are changed by transformers while it "
            "loads in a way that cannot be followed tensor by tensor; save the model with this version of "
            "transformers first"
        )
    _tie(model, keys)
    transposed = frozenset(keys[name] for name in straighten(model) if name in keys)
    _check_shapes(model, reader, keys, transposed, folder)
    return Skeleton(folder, config, raw, model, reader, keys, transposed)


def _refuse_unread_code(folder: Path, raw: dict[str, Any], trust_remote_code: bool) -> None:
    from transformers import CONFIG_MAPPING

    if trust_remote_code or not raw.get("auto_map") or raw.get("model_type") in CONFIG_MAPPING:
        return
    files = ", ".join(sorted(path.name for path in folder.glob("*.py"))) or "from the hub"
    raise StructureError(
        f"{folder} is a model that transformers knows only by the Python code that comes with it ({files}). "
        "Read that code, and allow it to run with trust_remote_code=True (--trust-remote-code)"
    )


def build(folder: Path, trust_remote_code: bool) -> tuple[Any, nn.Module]:
    """The configuration in a folder, and its model with parameters on the meta device.

    Raises:
        StructureError: transformers cannot make it, or it is no decoder.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        maker = auto_class(config, trust_remote_code)
        with init_empty_weights(include_buffers=False):
            model = maker.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # configuration and modelling code, anything may come
        raise StructureError(f"transformers cannot build the model in {folder}: {error}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise StructureError(
            f"{folder} is an encoder with a decoder ({type(model).__name__}); only decoders are quantized"
        )
    model.eval()
    return config, model


def _tie(model: nn.Module, keys: dict[str, str]) -> None:
    """Give tied parameters the checkpoint key of their twin, in whichever direction it was saved."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if target not in keys and source in keys:
            keys[target] = keys[source]
        elif source not in keys and target in keys:
            keys[source] = keys[target]


def _check_shapes(
    model: nn.Module,
    reader: CheckpointReader,
    keys: dict[str, str],
    transposed: frozenset[str],
    folder: Path,
) -> None:
    state = model.state_dict()
    missing = [name for name, _ in model.named_parameters() if name not in keys]
    if missing:
        raise CorruptFileError(f"{folder} lacks {len(missing)} weights: {', '.join(missing[:10])}")
    for name, _ in model.named_parameters():
        stored = reader.tensors[keys[name]].dtype
        if stored not in FLOAT_DTYPES:
            raise StructureError(
                f"{keys[name]} is stored as {stored}; convert the checkpoint to bfloat16 first"
            )
    expected = {
        keys[name]: tuple(reversed(tensor.shape)) if keys[name] in transposed else tuple(tensor.shape)
        for name, tensor in state.items()
        if name in keys
    }
    wrong = [
        f"{key} is {reader.tensors[key].shape}, the model wants {shape}"
        for key, shape in expected.items()
        if reader.tensors[key].shape != shape
    ]
    if wrong:
        raise CorruptFileError(f"{folder}: weights and config.json disagree: {'; '.join(wrong[:5])}")


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor, bool]]:
    """`(name, tensor, is_parameter)` of a module's own parameters and persistent buffers."""
    parameters = [(name, p, True) for name, p in module._parameters.items() if p is not None]
    persistent = [
        (name, b, False)
        for name, b in module._buffers.items()
        if b is not None and name not in module._non_persistent_buffers_set
    ]
    return parameters + persistent

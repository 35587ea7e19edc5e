"""`generate` with a static key/value cache of a length chosen when the model was loaded.

A cache whose size never changes is what lets transformers compile the model for decoding, and capture it in
CUDA graphs, on the devices on which it does so by itself. Between calls the length stays the same, so nothing
is compiled again.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import torch

# Arguments of `generate` by which the caller takes care of the cache, or wants what a static one cannot do.
_OTHER_CACHES = (
    *("past_key_values", "cache_implementation", "cache_config", "max_cache_len"),
    *("assistant_model", "prompt_lookup_num_tokens", "custom_generate"),
)


def how_to_compile(device: torch.device) -> dict[str, bool]:
    """Options for `torch.compile` with which a token takes a GPU least time; none where they change nothing.

    Many of a token's launches are over sooner than the next one has begun. So those that do not depend on one
    another become one, and on NVIDIA's from Hopper on each begins while the one ahead of it ends.
    """
    if device.type != "cuda":
        return {}
    options = {"triton.cudagraphs": True, "combo_kernels": True}
    if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9:
        options["triton.enable_pdl"] = True
    known = torch._inductor.list_options()
    return {name: value for name, value in options.items() if name in known}


class StaticGeneration:
    """Stands in for the `generate` of one model, and takes the same arguments.

    A call that needs more tokens than the cache holds, or that chooses a cache of its own, runs as if this
    were not there; the former says so in a warning.

    Args:
        model: whose `generate` it stands in for.
        length: tokens that the cache holds for each sequence, prompt and answer together.
    """

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.length = model, length
        functools.update_wrapper(self, type(model).generate)

    @staticmethod
    def reason_against(model: Any) -> str | None:
        """Why a static cache would be of no use for a model, or None."""
        if not model.can_generate():
            return f"{type(model).__name__} does not generate"
        if model.config.is_encoder_decoder:
            return "encoder-decoder models have two caches"
        quantizer = getattr(model, "hf_quantizer", None)
        if not model._can_compile_fullgraph or (quantizer is not None and not quantizer.is_compileable):
            return f"transformers does not compile {type(model).__name__} as a whole, which is what it is for"
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `generate`."""
        plain = functools.partial(type(self.model).generate, self.model)
        config = kwargs.get("generation_config") or self.model.generation_config

        def setting(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(config, name, None) if value is None else value

        if setting("use_cache") is False or any(setting(name) is not None for name in _OTHER_CACHES):
            return plain(*args, **kwargs)
        needed = self._needed(args, kwargs, setting("max_new_tokens"), setting("max_length"))
        if needed > self.length:
            warnings.warn(
                f"{needed} tokens (prompt and answer) do not fit the static cache of {self.length} that the "
                "model was loaded with, and are generated with one that grows: load the model with a larger "
                "max_seq_len (fuse_max_seq_len), or ask for fewer new tokens",
                stacklevel=2,
            )
            return plain(*args, **kwargs)
        options: dict[str, Any] = {"cache_implementation": "static", "max_cache_len": self.length}
        compiled = how_to_compile(self.model.device)
        if compiled and setting("compile_config") is None:
            from transformers import CompileConfig

            options["compile_config"] = CompileConfig(mode=None, options=compiled)
        if "generation_config" not in kwargs:
            return plain(*args, **kwargs, **options)
        config = copy.copy(config)  # transformers wants settings in one place
        for name, value in options.items():
            setattr(config, name, value)
        return plain(*args, **kwargs | {"generation_config": config})

    @staticmethod
    def _needed(args: Any, kwargs: dict[str, Any], new: int | None, longest: int | None) -> int:
        """Tokens of a prompt and its answer; an estimate, which decides only what kind of cache is made."""
        given = (*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
        prompt = next((len(each[0]) for each in given if each is not None), 1)
        if new is not None:
            return prompt + new
        return max(prompt + 1, longest) if longest is not None else prompt + 20

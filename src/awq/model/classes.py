"""Which of transformers' auto classes makes the generating model of a configuration."""

from __future__ import annotations

from typing import Any

from awq.errors import StructureError

# In order of preference, for configurations that more than one of them takes: a configuration with a text
# part and a vision part stands for the whole model, and the class for text alone would drop the rest.
_WHOLE = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM")
# The names under which remote code offers a model that generates.
_REMOTE = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel")


def auto_class(config: Any, trust_remote_code: bool = False) -> Any:
    """The auto class of transformers for a configuration.

    Where several classes take it, it is the one whose model the checkpoint was saved from (`architectures`),
    else one that makes the whole model and not its text decoder alone.

    Args:
        config: transformers' configuration object.
        trust_remote_code: modelling code that comes with the model may be used.

    Raises:
        StructureError: no class of this version of transformers makes a generating model of it.
    """
    import transformers

    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code:
        offered = [name for name in _REMOTE if name in remote]
        if offered:
            return getattr(transformers, offered[0])
    classes = [getattr(transformers, name) for name in _WHOLE if hasattr(transformers, name)]
    taking = [cls for cls in classes if type(config) in cls._model_mapping]
    saved = set(getattr(config, "architectures", None) or ())
    for cls in taking:
        if saved & _made_by(cls, config):
            return cls
    if taking:
        return taking[0]
    if any(name in remote for name in _REMOTE):
        # transformers asks for consent itself, in its own words.
        return getattr(transformers, next(name for name in _REMOTE if name in remote))
    raise StructureError(
        f"transformers {transformers.__version__} has no model that generates text for the model type "
        f"{getattr(config, 'model_type', None)!r}; a newer version may have one"
    )


def _made_by(cls: Any, config: Any) -> set[str]:
    """Names of the model classes that an auto class makes of a configuration."""
    made = cls._model_mapping[type(config)]
    return {one.__name__ for one in (made if isinstance(made, (tuple, list)) else (made,))}

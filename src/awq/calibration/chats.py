"""Conversations with images: their files are opened, and the model's processor does the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from awq.calibration.inputs import ModelInputs, model_inputs
from awq.errors import AwqError, CalibrationError, MissingDependencyError, MissingFileError, first_line

# Where the parts of a message name their file, in the order in which transformers looks.
_PLACES = ("path", "url", "image", "video", "audio")
# What is not the name of a file here: transformers fetches or decodes it.
_ELSEWHERE = ("http://", "https://", "data:")


def has_media(messages: Any) -> bool:
    """Whether a conversation holds anything but text."""
    return any(
        isinstance(part, Mapping) and part.get("type") != "text"
        for message in messages
        for part in _parts(message.get("content"))
    )


def conversation(messages: Sequence[Any], processor: Any, folder: Path | None, where: str) -> ModelInputs:
    """What the processor makes of a conversation.

    Args:
        messages: `{"role", "content"}`, the content a text or a list of parts, such as
            `{"type": "image", "path": …}` (`image` may hold an opened one) and `{"type": "text", "text": …}`.
        processor: the model's, with a chat template.
        folder: where relative paths begin; the current one by default.
        where: for messages.

    Raises:
        MissingFileError: a file does not exist.
        MissingDependencyError: Pillow is not installed.
        CalibrationError: a file is no image, or the processor does not take the conversation.
    """
    opened = [
        {**message, "content": [_opened(part, folder, where) for part in _parts(message.get("content"))]}
        for message in messages
    ]
    try:
        made = processor.apply_chat_template(opened, tokenize=True, return_dict=True, return_tensors="pt")
    except AwqError:
        raise
    except ImportError as error:
        raise MissingDependencyError(f"{where}: the processor needs more: {first_line(error)}") from error
    except Exception as error:  # processors and templates raise what they like
        raise CalibrationError(
            f"{where} holds images, and the model's processor does not take a conversation of it: "
            f"{first_line(error)}"
        ) from error
    return model_inputs(made, where)


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())


def _opened(part: Any, folder: Path | None, where: str) -> Any:
    """A part with its image opened, and any other file found."""
    if not isinstance(part, Mapping) or part.get("type") == "text":
        return part
    part, kind = dict(part), str(part.get("type"))
    if kind == "image_url":  # OpenAI's spelling
        link = part["image_url"]
        kind, part = "image", {"type": "image", "url": link["url"] if isinstance(link, Mapping) else link}
    place = next((name for name in _PLACES if isinstance(part.get(name), (str, Path))), None)
    if place is None:
        return part  # an opened image, or base64
    name = str(part[place])
    if name.startswith(_ELSEWHERE):
        return {"type": kind, "url": name}
    path = Path(name.removeprefix("file://")).expanduser()
    path = path if folder is None else folder / path
    if not path.is_file():
        raise MissingFileError(f"{where} names {path}, which does not exist")
    return (
        {"type": kind, "image": _image(path, where)} if kind == "image" else {"type": kind, "path": str(path)}
    )


def _image(path: Path, where: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            f"{where} names images, which need Pillow: pip install 'openawq[vision]'"
        ) from error
    try:
        return Image.open(path).convert("RGB")
    except Exception as error:  # damaged files raise many kinds
        raise CalibrationError(f"{where} names {path}, which is no image: {first_line(error)}") from error

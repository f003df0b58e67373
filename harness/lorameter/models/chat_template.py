"""Whether a model's tokenizer has a chat template, read from its files before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from lorameter.errors import UsageError
from lorameter.models import shapes
from lorameter.models.catalogue import ModelSource
from lorameter.records import fileio

_FILES = ("chat_template.jinja", "chat_template.json")
_GGUF_KEY = "tokenizer.chat_template"


def has_chat_template(source: ModelSource) -> bool | None:
    """Whether conversations can be written as this model reads them; None where only the loaded tokenizer tells.

    The byte tokenizer has a template of its own. Files that cannot be read are reported when they are loaded.
    """
    if source.tokenizer == "byte":
        return True
    if source.random:  # whatever cannot be had, bytes stand in for
        return None
    if source.kind == "gguf":
        return _GGUF_KEY in shapes.gguf_of(Path(source.location)).values
    if source.kind != "directory":
        return None
    folder = Path(source.location)
    if any(fileio.is_file(folder / name) for name in _FILES):
        return True
    try:
        config = fileio.read_json(folder / "tokenizer_config.json", fileio.CONFIG_BYTES)
    except fileio.NotReadableError:
        return None
    return isinstance(config, dict) and bool(config.get("chat_template"))


def no_chat_template(model: str) -> UsageError:
    """The one message for conversations that a model has no template for."""
    return UsageError(
        f"model {model!r}: its tokenizer has no chat template, and the data is conversations. Use a model made for "
        "them (often called Instruct or Chat), put its chat_template.jinja next to the tokenizer, or use data of "
        "prompt "
        "and completion."
    )

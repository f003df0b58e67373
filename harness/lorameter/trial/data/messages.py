"""Conversations: lists of messages by role and content, or from and value as ShareGPT has them, made one thing.

What a chat template would pass over in silence, pictures and calls of tools, is refused here by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorameter.errors import UsageError, shorten

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"
_SPEAKERS = {"human": "user", "gpt": ASSISTANT}
"""ShareGPT's words for two of the roles."""
_KEYS = (("role", "content"), ("from", "value"))
_CALLS = ("tool_calls", "function_call")
_HALF = re.compile("[\ud800-\udfff]")
_MEND = "Mend it, or take the record out."


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTurn:
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A record of messages, with its place for whoever finds that a template does not take it."""

    place: str
    messages: tuple[ChatTurn, ...]


def read_conversation(value: Any, place: str, column: str) -> Conversation:
    """The conversation that a cell holds.

    Raises:
        UsageError: it is none, lacks a text or an answer, or holds what no text is.
    """
    if not isinstance(value, list) or not value:
        said = "null" if value is None else shorten(repr(value), 60)
        raise UsageError(f"{place}: {column} = {said}: a list of messages is expected. {_MEND}")
    messages = tuple(_message(one, f"{place}: {column}, message {number}") for number, one in enumerate(value, 1))
    if all(message.role != ASSISTANT for message in messages):
        raise UsageError(f"{place}: {column}: no message is the assistant's, so there is no answer. {_MEND}")
    return Conversation(place=place, messages=messages)


def _message(value: Any, place: str) -> ChatTurn:
    table = value if isinstance(value, Mapping) else {}
    present = {key: item for key, item in table.items() if item is not None}  # a table fills up with nulls
    for key in _CALLS:
        if present.get(key):
            raise UsageError(f"{place}: {key}: calls of tools are not trained on. Take the record out.")
    keys = next((keys for keys in _KEYS if keys[0] in present), None)
    if keys is None:
        said = shorten(repr(value), 60)
        raise UsageError(f"{place} = {said}: role and content, or from and value, are expected. {_MEND}")
    speaker, content = present[keys[0]], table.get(keys[1])
    role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if role not in ROLES:
        known = ", ".join((*ROLES, *_SPEAKERS))
        raise UsageError(f"{place}: {keys[0]} = {shorten(repr(speaker), 60)}: not known. Known: {known}.")
    return ChatTurn(role=role, content=_content(content, f"{place}: {keys[1]}"))


def _content(value: Any, place: str) -> str:
    """A text, or a list of parts that are texts, joined."""
    if isinstance(value, list):
        return "".join(_part(part, f"{place}, part {number}") for number, part in enumerate(value, 1))
    return check_text(value, place)


def _part(value: Any, place: str) -> str:
    if not isinstance(value, Mapping):
        return check_text(value, place)
    kind = value.get("type", "text")
    if kind != "text":
        raise UsageError(f"{place}: type = {shorten(repr(kind), 60)}: only texts are trained on. Take the record out.")
    return check_text(value.get("text"), f"{place}: text")


def check_text(value: Any, place: str) -> str:
    """The value, if it is a text that UTF-8 can hold, as halves of characters cannot be. Raises `UsageError` else."""
    if isinstance(value, str) and (value.isascii() or not _HALF.search(value)):
        return value
    said = "null" if value is None else shorten(repr(value), 60)
    raise UsageError(f"{place} = {said}: a text is expected. {_MEND}")

"""Conversations (role and content, or from and value as in ShareGPT), rendered with the tokenizer's chat template, and
the character ranges of the assistant's answers.

If the template marks answers (`{% generation %}`), the marks are used. Otherwise each answer is located by rendering
the conversation up to its end twice, once as it is and once with a placeholder as its content: the text around the
placeholder is the template's. The rendering must be a prefix of the whole text. A template that renders a turn
differently when others follow (one that drops earlier reasoning, for example) is refused, since the answer's tokens
cannot be located.

A template may write today's date. Runs of different days would then have different tokens, so the date is fixed.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorameter.errors import UsageError, shorten
from lorameter.models.chat_template import no_chat_template

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"
_SPEAKERS = {"human": "user", "gpt": ASSISTANT}
"""ShareGPT's names of two of the roles."""
_KEYS = (("role", "content"), ("from", "value"))
_CALLS = ("tool_calls", "function_call")
_HALF = re.compile("[\ud800-\udfff]")
_REPAIR = "Correct it, or take the record out."


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A record of messages, with its file and row for error messages."""

    place: str
    messages: tuple[Message, ...]


def read_conversation(value: Any, place: str, column: str) -> Conversation:
    """The conversation in a cell.

    Raises:
        UsageError: the cell has another type, a text or the answer is missing, or a part is no text.
    """
    if not isinstance(value, list) or not value:
        said = "null" if value is None else shorten(repr(value), 60)
        raise UsageError(f"{place}: {column} = {said}: a list of messages is expected. {_REPAIR}")
    messages = tuple(_message(one, f"{place}: {column}, message {number}") for number, one in enumerate(value, 1))
    if all(message.role != ASSISTANT for message in messages):
        raise UsageError(f"{place}: {column}: no message is the assistant's, so there is no answer. {_REPAIR}")
    return Conversation(place=place, messages=messages)


def _message(value: Any, place: str) -> Message:
    table = value if isinstance(value, Mapping) else {}
    present = {key: item for key, item in table.items() if item is not None}  # Arrow adds the other keys as nulls
    for key in _CALLS:
        if present.get(key):
            raise UsageError(f"{place}: {key}: tool calls are not supported. Take the record out.")
    keys = next((keys for keys in _KEYS if keys[0] in present), None)
    if keys is None:
        said = shorten(repr(value), 60)
        raise UsageError(f"{place} = {said}: role and content, or from and value, are expected. {_REPAIR}")
    speaker, content = present[keys[0]], table.get(keys[1])
    role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if role not in ROLES:
        known = ", ".join((*ROLES, *_SPEAKERS))
        raise UsageError(f"{place}: {keys[0]} = {shorten(repr(speaker), 60)}: not known. Known: {known}.")
    return Message(role=role, content=check_text(content, f"{place}: {keys[1]}"))


def check_text(value: Any, place: str) -> str:
    """The value, if it is a text that UTF-8 can encode (no lone surrogates). Raises `UsageError` otherwise."""
    if isinstance(value, str) and (value.isascii() or not _HALF.search(value)):
        return value
    said = "null" if value is None else shorten(repr(value), 60)
    raise UsageError(f"{place} = {said}: a text is expected. {_REPAIR}")


# --- the template -----------------------------------------------------------------------------------------------------

Span = tuple[int, int]
"""Character range of a text, half-open."""
_MARKED = re.compile(r"{%-?\+?\s*generation\s*-?\+?%}")
_PLACEHOLDER = "\ue000answer\ue000"
_CODES = ("%a", "%A", "%d", "%-d", "%e", "%b", "%B", "%m", "%-m", "%y", "%Y", "%H", "%I", "%M", "%S", "%p", "%j", "%Z")
_DAY = datetime.datetime(2026, 1, 1)
_CLOCK = "strftime_now"
"""The function from which templates take the date; an argument cannot replace it, but a macro can."""
_FIXED_CLOCK = (
    f"{{% macro {_CLOCK}(format) %}}{{{{ format"
    + "".join(f" | replace({code!r}, {_DAY.strftime(code)!r})" for code in _CODES)
    + " }}{% endmacro %}\n"
)


class ChatTemplate:
    """The template of one tokenizer. Raises `UsageError` where it has none."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        self._tokenizer = tokenizer
        self._model = model
        try:
            template: str = tokenizer.get_chat_template()
        except ValueError:
            raise no_chat_template(model) from None
        self._marked = _MARKED.search(template) is not None
        self._template = f"{_FIXED_CLOCK}{template}" if _CLOCK in template else template

    def text(self, conversation: Conversation) -> str:
        """The whole conversation.

        Raises:
            UsageError: the template refuses it or leaves a message out.
        """
        text = self._write(conversation.messages, conversation.place)
        missing = _missing(text, conversation.messages)
        if missing is not None:
            raise UsageError(
                f"{conversation.place}: the chat template of {self._model} does not write message {missing} "
                f"({conversation.messages[missing - 1].role}) as it is. Take it out, or use a model whose template "
                "writes it."
            )
        return text

    def prompt(self, conversation: Conversation) -> tuple[str, str]:
        """The text before the last answer, with the generation prompt, and that answer."""
        last = max(n for n, message in enumerate(conversation.messages) if message.role == ASSISTANT)
        if not last:
            raise UsageError(
                f"{conversation.place}: the assistant begins, so there is no prompt. Take that message out."
            )
        before = self._write(conversation.messages[:last], conversation.place, ask=True)
        return before, conversation.messages[last].content

    def answers(self, conversation: Conversation, text: str) -> list[Span]:
        """The ranges of the assistant's answers in the text, each with the end of its turn.

        Raises:
            UsageError: an answer cannot be located.
        """
        if self._marked:
            return self._marked_answers(conversation, text)
        turns = (n for n, message in enumerate(conversation.messages) if message.role == ASSISTANT)
        return [self._answer(conversation, number, text) for number in turns]

    def _marked_answers(self, conversation: Conversation, text: str) -> list[Span]:
        encoded = self._apply(
            conversation.messages, conversation.place, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True, tokenizer_kwargs={"return_offsets_mapping": True},
        )  # fmt: skip
        spans: list[Span] = []
        for (begin, end), marked in zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True):
            if marked and spans and begin <= spans[-1][1]:
                spans[-1] = (spans[-1][0], end)
            elif marked:
                spans.append((begin, end))
        missing = _missing(
            "".join(text[begin:end] for begin, end in spans),
            [message for message in conversation.messages if message.role == ASSISTANT],
        )
        if missing is not None:
            raise UsageError(
                f"{conversation.place}: the chat template of {self._model} does not mark answer {missing}. {_ALL}"
            )
        return spans

    def _answer(self, conversation: Conversation, number: int, text: str) -> Span:
        before, message = conversation.messages[:number], conversation.messages[number]
        placeholder = Message(role=message.role, content=_PLACEHOLDER)
        head, _, tail = self._write([*before, placeholder], conversation.place).partition(_PLACEHOLDER)
        turn = self._write([*before, message], conversation.place)
        content = next((one for one in (message.content, message.content.strip()) if turn == head + one + tail), None)
        if content is None or not text.startswith(turn):
            raise UsageError(
                f"{conversation.place}: the chat template of {self._model} writes message {number + 1} differently "
                f"when others follow, or not as it is, so its tokens cannot be located. {_ALL}"
            )
        return len(head), len(head) + len(content) + len(tail.rstrip() or tail)

    def _write(self, messages: Sequence[Message], place: str, *, ask: bool = False) -> str:
        text: str = self._apply(messages, place, tokenize=False, add_generation_prompt=ask)
        return text

    def _apply(self, messages: Sequence[Message], place: str, **options: Any) -> Any:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(turns, chat_template=self._template, **options)
        except Exception as error:  # a template is a program of the model's author
            reason = shorten(str(error).strip() or type(error).__name__, 200)
            raise UsageError(
                f"{place}: the chat template of {self._model} does not accept it: {reason}. Correct the record, or "
                "take it out."
            ) from None


_ALL = 'Use loss = "all", or a template that marks the answers with {% generation %}.'


def _missing(text: str, messages: Sequence[Message]) -> int | None:
    """The number of the first message that does not follow the earlier ones in the text; None if all do. White space is
    ignored, since templates strip it."""
    text, begin = "".join(text.split()), 0
    for number, message in enumerate(messages, 1):
        content = "".join(message.content.split())
        begin = text.find(content, begin)
        if begin < 0:
            return number
        begin += len(content)
    return None

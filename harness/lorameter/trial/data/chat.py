"""Renders conversations with the tokenizer's chat template, and locates the character ranges of the assistant's
answers. Messages have role and content, or from and value as in ShareGPT.

If the template marks answers (`{% generation %}`), the marks are used. Otherwise each answer is located by rendering
the conversation up to its end twice, once unchanged and once with a placeholder as its content: the text around the
placeholder comes from the template. The rendering must be a prefix of the whole text. A template that renders a turn
differently when others follow (one that drops earlier reasoning, for example) is refused, since the answer's tokens
cannot be located.

A template may insert the current date. Runs on different days would then have different tokens, so the date is fixed,
in one format.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorameter.errors import UsageError, require, shorten

Message = dict[str, str]
"""A message with `role` and `content`, as templates expect it."""
ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"
_SHAREGPT_ROLES = {"human": "user", "gpt": ASSISTANT}
"""ShareGPT's names of two of the roles."""
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))
_SURROGATES = re.compile("[\ud800-\udfff]")
REPAIR = "Correct it, or remove the record."


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A record of messages with `role` and `content`; `place` is its file and row for error messages."""

    place: str
    messages: tuple[Message, ...]


def read_conversation(value: Any, place: str, column: str) -> Conversation:
    """The conversation in a cell.

    Raises:
        UsageError: the cell has another type, a text or the answer is missing, or a part is not text.
    """
    if not isinstance(value, list) or not value:
        raise UsageError(f"{place}: {column} = {_show(value)}: a list of messages is expected. {REPAIR}")
    messages = tuple(_read_message(one, f"{place}: {column}, message {number}") for number, one in enumerate(value, 1))
    require(_answers(messages), f"{place}: {column}: no message is the assistant's, so there is no answer. {REPAIR}")
    return Conversation(place=place, messages=messages)


def _read_message(value: Any, place: str) -> Message:
    table = value if isinstance(value, Mapping) else {}
    present = {key: item for key, item in table.items() if item is not None}  # Arrow adds the other keys as nulls
    for key in ("tool_calls", "function_call"):
        require(not present.get(key), f"{place}: {key}: tool calls are not supported. Remove the record.")
    keys = next((keys for keys in _MESSAGE_KEYS if keys[0] in present), None)
    if keys is None:
        raise UsageError(f"{place} = {_show(value)}: role and content, or from and value, are expected. {REPAIR}")
    speaker = present[keys[0]]
    role = _SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if role not in ROLES:
        known = ", ".join((*ROLES, *_SHAREGPT_ROLES))
        raise UsageError(f"{place}: {keys[0]} = {_show(speaker)}: not known. Known: {known}.")
    return {"role": role, "content": check_text(table.get(keys[1]), f"{place}: {keys[1]}")}


def check_text(value: Any, place: str) -> str:
    """The value, if it is a text that UTF-8 can encode (no lone surrogates). Raises `UsageError` otherwise."""
    if isinstance(value, str) and (value.isascii() or not _SURROGATES.search(value)):
        return value
    raise UsageError(f"{place} = {_show(value)}: a text is expected. {REPAIR}")


def _show(value: Any) -> str:
    return "null" if value is None else shorten(repr(value), 60)


def _answers(messages: Sequence[Message]) -> list[int]:
    """Indices of the assistant's messages."""
    return [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]


# --- the template -----------------------------------------------------------------------------------------------------

Span = tuple[int, int]
"""Character range of a text, half-open."""
_MARKED = re.compile(r"{%-?\+?\s*generation\s*-?\+?%}")
_PLACEHOLDER = "\ue000answer\ue000"
_CLOCK = "strftime_now"
"""The function with which templates read the date; an argument cannot replace it, but a macro can."""
_FIXED_CLOCK = f"{{% macro {_CLOCK}(format) %}}01 Jan 2026{{% endmacro %}}\n"


class ChatTemplate:
    """The template of one tokenizer. Raises `UsageError` if it has none, or if it does not accept a record."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        self._tokenizer = tokenizer
        self._model = model
        try:
            template: str = tokenizer.get_chat_template()
        except ValueError:
            raise UsageError(
                f"model {model!r}: its tokenizer has no chat template, and the data is conversations. Use a model made "
                "for them (often called Instruct or Chat), put its chat_template.jinja next to the tokenizer, or use "
                "data of prompt and completion."
            ) from None
        self._marked = _MARKED.search(template) is not None
        self._template = f"{_FIXED_CLOCK}{template}" if _CLOCK in template else template

    def text(self, conversation: Conversation) -> str:
        """The text of the whole conversation. Raises `UsageError` if the template omits a message."""
        text: str = self._render(conversation, conversation.messages, tokenize=False)
        missing = _find_missing(text, conversation.messages)
        if missing is not None:
            role = conversation.messages[missing - 1]["role"]
            raise self._refuse(
                conversation,
                f"does not write message {missing} ({role}) as it is. Remove the message, or use a model "
                "whose template writes it.",
            )
        return text

    def prompt(self, conversation: Conversation) -> tuple[str, str]:
        """The text before the last answer, with the generation prompt, and that answer."""
        last = _answers(conversation.messages)[-1]
        require(last, f"{conversation.place}: the assistant begins, so there is no prompt. Remove that message.")
        before = conversation.messages[:last]
        text: str = self._render(conversation, before, tokenize=False, add_generation_prompt=True)
        return text, conversation.messages[last]["content"]

    def answers(self, conversation: Conversation, text: str) -> list[Span]:
        """The ranges of the assistant's answers in the text, each including the end of its turn. Raises `UsageError` if
        one cannot be located."""
        if self._marked:
            return self._find_marked(conversation, text)
        return [self._locate(conversation, number, text) for number in _answers(conversation.messages)]

    def _find_marked(self, conversation: Conversation, text: str) -> list[Span]:
        encoded = self._render(
            conversation, conversation.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )  # fmt: skip
        tokens = zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
        runs = [list(run) for marked, run in itertools.groupby(tokens, key=operator.itemgetter(0)) if marked]
        spans = [(run[0][1][0], run[-1][1][1]) for run in runs]
        answers = [conversation.messages[number] for number in _answers(conversation.messages)]
        missing = _find_missing("".join(text[begin:end] for begin, end in spans), answers)
        if missing is not None:
            raise self._refuse(conversation, f"does not mark answer {missing}. {_LOSS_REMEDY}")
        return spans

    def _locate(self, conversation: Conversation, number: int, text: str) -> Span:
        before, message = conversation.messages[:number], conversation.messages[number]
        marked = (*before, message | {"content": _PLACEHOLDER})
        head, _, tail = self._render(conversation, marked, tokenize=False).partition(_PLACEHOLDER)
        turn = self._render(conversation, (*before, message), tokenize=False)
        text_of_message = message["content"]
        content = next((one for one in (text_of_message, text_of_message.strip()) if turn == head + one + tail), None)
        if content is None or not text.startswith(turn):
            raise self._refuse(
                conversation,
                f"writes message {number + 1} differently when others follow, or not as it is, so its tokens cannot be "
                f"located. {_LOSS_REMEDY}",
            )
        return len(head), len(head) + len(content) + len(tail.rstrip() or tail)

    def _render(self, conversation: Conversation, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(list(messages), chat_template=self._template, **options)
        except Exception as error:  # a template is a program and can raise anything
            reason = shorten(str(error).strip() or type(error).__name__, 200)
            why = f"does not accept it: {reason}. Correct the record, or take it out."
            raise self._refuse(conversation, why) from None

    def _refuse(self, conversation: Conversation, why: str) -> UsageError:
        return UsageError(f"{conversation.place}: the chat template of {self._model} {why}")


_LOSS_REMEDY = 'Use loss = "all", or a template that marks the answers with {% generation %}.'


def _find_missing(text: str, messages: Sequence[Message]) -> int | None:
    """The number, from 1, of the first message that does not follow the earlier ones in the text; None if all do. White
    space is ignored, since templates strip it."""
    text, begin = "".join(text.split()), 0
    for number, message in enumerate(messages, 1):
        content = "".join(message["content"].split())
        begin = text.find(content, begin)
        if begin < 0:
            return number
        begin += len(content)
    return None

"""Conversations written by the tokenizer's own chat template, and which of their characters are the assistant's.

Where the template marks what the assistant says (`{% generation %}`), that is it. Else each of the assistant's turns is
found by writing the conversation up to its end, once as it is and once with a stand-in for what is said: what stands
before and behind the stand-in is the template's. Both writings must be beginnings of the whole. A template that writes
a turn differently once others follow (one that drops earlier reasoning, say) has no such beginnings, and which tokens
the model would have said cannot be told: that is refused, not guessed.

A template may write today's date. Two runs of different days would then differ in their tokens, so it is told one day.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Sequence
from typing import Any

from lorameter.errors import UsageError, shorten
from lorameter.machine.rlimits import OverTimeError, memory_limit, time_limit
from lorameter.models.chat_template import no_chat_template
from lorameter.trial.data.messages import ASSISTANT, ChatTurn, Conversation

Span = tuple[int, int]
"""Characters of a text, the end left out."""
_MARKED = re.compile(r"{%-?\+?\s*generation\s*-?\+?%}")
_STAND_IN = "\ue000what is said\ue000"
_CODES = ("%a", "%A", "%d", "%-d", "%e", "%b", "%B", "%m", "%-m", "%y", "%Y", "%H", "%I", "%M", "%S", "%p", "%j", "%Z")
_DAY = datetime.datetime(2026, 1, 1)
_CLOCK = "strftime_now"
"""What templates ask for the date: a function, which no argument can take the place of, but a macro can."""
_STOPPED = (
    f"{{% macro {_CLOCK}(format) %}}{{{{ format"
    + "".join(f" | replace({code!r}, {_DAY.strftime(code)!r})" for code in _CODES)
    + " }}{% endmacro %}\n"
)
"""Its newline is the macro's, so the template begins a line as before."""


RECORD_S, CHARACTER_S = 1.0, 2e-6
"""A template is a program, and may be one without end. On one writing of a conversation it may compute for so long, and
longer by its characters; one that somebody uses needs a thousandth of it."""
TOTAL_S = 900.0
"""On all of them together."""
RECORD_BYTES, CHARACTER_BYTES = 512 << 20, 64
"""Of memory, as of time."""


class ChatTemplate:
    """The template of one tokenizer. Raises `UsageError` where it has none."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._computed_s = 0.0
        try:
            template: str = tokenizer.get_chat_template()
        except ValueError:
            raise no_chat_template(model) from None
        self._marked = _MARKED.search(template) is not None
        self._template = f"{_STOPPED}{template}" if _CLOCK in template else template

    def text(self, conversation: Conversation) -> str:
        """The whole conversation.

        Raises:
            UsageError: the template refuses it, or leaves a message out.
        """
        text = self._write(conversation.messages, conversation.place)
        missing = _missing(text, conversation.messages)
        if missing is not None:
            raise UsageError(
                f"{conversation.place}: the chat template of {self._model} does not write message {missing} "
                f"({conversation.messages[missing - 1].role}) as it is. Take it out, or use a model whose template has "
                "a place for it."
            )
        return text

    def prompt(self, conversation: Conversation) -> tuple[str, str]:
        """What comes before the last answer, up to where the model goes on, and that answer."""
        last = max(n for n, message in enumerate(conversation.messages) if message.role == ASSISTANT)
        if not last:
            raise UsageError(
                f"{conversation.place}: the assistant begins, so there is no prompt. Take that message out."
            )
        before = self._write(conversation.messages[:last], conversation.place, ask=True)
        return before, conversation.messages[last].content

    def answers(self, conversation: Conversation, text: str) -> list[Span]:
        """Where the assistant's answers stand in the text, each with what ends its turn.

        Raises:
            UsageError: it cannot be told.
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
        for (begin, end), said in zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True):
            if said and spans and begin <= spans[-1][1]:
                spans[-1] = (spans[-1][0], end)
            elif said:
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
        stand_in = ChatTurn(role=message.role, content=_STAND_IN)
        head, _, tail = self._write([*before, stand_in], conversation.place).partition(_STAND_IN)
        turn = self._write([*before, message], conversation.place)
        said = next((one for one in (message.content, message.content.strip()) if turn == head + one + tail), None)
        if said is None or not text.startswith(turn):
            raise UsageError(
                f"{conversation.place}: the chat template of {self._model} writes message {number + 1} differently "
                f"when others follow, or not as it is, so its tokens cannot be told. {_ALL}"
            )
        return len(head), len(head) + len(said) + len(tail.rstrip() or tail)

    def _write(self, messages: Sequence[ChatTurn], place: str, *, ask: bool = False) -> str:
        text: str = self._apply(messages, place, tokenize=False, add_generation_prompt=ask)
        return text

    def _apply(self, messages: Sequence[ChatTurn], place: str, **how: Any) -> Any:
        said = [{"role": message.role, "content": message.content} for message in messages]
        characters = sum(len(message.content) for message in messages)
        most_s, most_bytes = RECORD_S + CHARACTER_S * characters, RECORD_BYTES + CHARACTER_BYTES * characters
        begin_s = time.process_time()
        try:
            with time_limit(most_s), memory_limit(most_bytes):
                written = self._tokenizer.apply_chat_template(said, chat_template=self._template, **how)
        except OverTimeError:
            raise self._endless(place, f"comes to no end in {most_s:.3g} s of computing") from None
        except MemoryError:
            raise self._endless(place, f"asks for more than {most_bytes >> 20} MiB of memory") from None
        except Exception as error:  # a template is a program of somebody else
            why = shorten(str(error).strip() or type(error).__name__, 200)
            raise UsageError(
                f"{place}: the chat template of {self._model} does not take it: {why}. Mend the record, or take it out."
            ) from None
        self._computed_s += time.process_time() - begin_s
        if self._computed_s > TOTAL_S:
            raise self._endless(place, f"has computed for more than {TOTAL_S:g} s until this record")
        return written

    def _endless(self, place: str, said: str) -> UsageError:
        model = shorten(repr(self._model), 120)
        return UsageError(f"{place}: the chat template of model {model} {said}. Mend it, or use another model.")


_ALL = 'Use loss = "all", or a template that marks the answers with {% generation %}.'


def _missing(text: str, messages: Sequence[ChatTurn]) -> int | None:
    """The number of the first message that does not stand in the text behind those before it; None if all do. Space is
    not looked at: templates strip it."""
    text, begin = "".join(text.split()), 0
    for number, message in enumerate(messages, 1):
        content = "".join(message.content.split())
        begin = text.find(content, begin)
        if begin < 0:
            return number
        begin += len(content)
    return None

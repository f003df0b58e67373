"""Conversations of either spelling are one thing, and what is no text in them is refused by name."""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError
from lorameter.trial.data.messages import ChatTurn, read_conversation

PICTURE = {"type": "image_url", "image_url": "x"}
ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def read(*messages):
    return read_conversation(list(messages), "line 3", "messages")


def test_both_spellings_are_one():
    """role and content, from and value, with the nulls that a table fills up with, and parts of text joined."""
    expected = (ChatTurn(role="user", content="a"), ChatTurn(role="assistant", content="b"))
    shared = {"from": "gpt", "value": "b", "role": None, "content": None}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "b"}], "tool_calls": None}
    split = {"role": "assistant", "content": ["", {"text": "b", "type": "text"}]}
    assert read(ASK, ANSWER).messages == expected
    assert read({"from": "human", "value": "a"}, shared).messages == expected
    assert read(ASK, parts).messages == read(ASK, split).messages == expected
    system, tool = {"role": "system", "content": "s"}, {"role": "tool", "content": "t"}
    assert [one.role for one in read(system, ASK, tool, ANSWER).messages] == ["system", "user", "tool", "assistant"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "content": None}, "message 2: content = null: a text is expected"),
        ({"role": "assistant"}, "message 2: content = null"),
        ({"role": "assistant", "content": 3}, "message 2: content = 3"),
        ({"role": "assistant", "content": {"text": "x"}}, "message 2: content = .*: a text is expected"),
        ({"role": "narrator", "content": "x"}, "message 2: role = 'narrator': not known. Known: system"),
        ({"role": ["user"], "content": "x"}, "message 2: role = .*: not known"),
        ({"from": "observation", "value": "x"}, "message 2: from = 'observation': not known"),
        ({"from": "gpt", "value": None}, "message 2: value = null"),
        ({"speaker": "a", "text": "x"}, "message 2 = .*role and content, or from and value"),
        ("b", "message 2 = 'b'"),
        (None, "message 2 = None"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "message 2: tool_calls: calls of tools"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "message 2: function_call: calls"),
        ({"role": "user", "content": [PICTURE]}, "message 2: content, part 1: type = 'image_url': only"),
        ({"role": "user", "content": [{"type": "text"}]}, "message 2: content, part 1: text = null"),
        ({"role": "user", "content": [3]}, "message 2: content, part 1 = 3"),
        ({"role": "user", "content": "\udc00"}, "message 2: content = .*: a text"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_name(message, words):
    """With the line, the number of the message and what to do."""
    with pytest.raises(UsageError, match=f"line 3: messages, {words}"):
        read(ASK, message, ANSWER)


def test_a_conversation_without_an_answer_is_refused():
    """There would be nothing to learn from it."""
    with pytest.raises(UsageError, match="line 3: messages: no message is the assistant's"):
        read(ASK, ASK)

"""Records are recognised by the names of their columns, and by nothing that they do not say."""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError
from lorameter.studies.columns import DataColumns
from lorameter.trial.data.detect_format import recognise


@pytest.mark.parametrize(
    ("names", "title", "parts"),
    [
        ("instruction context response id", "instruction/context/response", {"instruction", "context", "response"}),
        ("instruction response", "instruction/response", {"instruction", "response"}),
        ("instruction input output", "instruction/input/output", {"instruction", "context", "response"}),
        ("instruction input output text", "instruction/input/output", {"instruction", "context", "response"}),
        ("output instruction", "instruction/output", {"instruction", "response"}),
        ("prompt completion", "prompt/completion", {"prompt", "completion"}),
        ("messages prompt prompt_id", "messages", {"messages"}),
        ("id conversations", "conversations", {"messages"}),
        ("text label", "text", {"text"}),
    ],
)  # fmt: skip
def test_columns_that_people_have_are_recognised(names, title, parts):
    """Those of dolly, Alpaca, prompts with completions, chats, ShareGPT and plain text, in any order, beside others."""
    form = recognise(names.split(), DataColumns(), "data")
    assert (form.title, set(form.columns)) == (title, parts)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("question answer", "no columns that are known. There are 'question', 'answer'"),
        ("instruction context", "no column 'response'"),
        ("instruction input", "no column 'output'"),
        ("prompt", "no column 'completion'"),
        ("messages conversations", "can be read as messages and as conversations"),
        ("prompt completion messages", "can be read as prompt/completion and as messages"),
        ("instruction response output", "instruction/response and as instruction/output"),
        ("", "no columns that are known"),
    ],
)
def test_what_is_not_recognised_or_twice_is_refused(names, words):
    """With the columns that are there, and with how to name them."""
    with pytest.raises(UsageError, match=words) as caught:
        recognise(names.split(), DataColumns(), "data 'x', line 1")
    assert "data 'x', line 1" in str(caught.value)
    assert "columns = { instruction" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "row", "words"),
    [
        (["prompt", "completion"], {"prompt": "a"}, "no column 'completion'. The first record has prompt/completion"),
        (["text"], {"instruction": "a", "response": "b"}, "no column 'text'. The first record has text"),
        (["text"], {"text": None}, "text = null: a text is expected"),
        (["text"], {"text": 3}, "text = 3: a text"),
        (["text"], {"text": ["a"]}, r"text = \['a'\]: a text"),
        (["text"], {"text": "\ud800"}, "text = .*: a text"),
        (["text"], ["a"], r"\['a'\]: a table of columns is expected"),
        (["instruction", "output"], {"instruction": "a", "input": "b", "output": "c"}, "it has 'input', and the first"),
        (["instruction", "input", "output"], {"instruction": "a", "output": "c"}, "no column 'input'"),
        (["messages"], {"messages": "[]"}, r"messages = '\[\]': a list of messages is expected"),
    ],
)
def test_a_row_that_differs_from_the_first_is_refused(names, row, words):
    """A column too few, one more that would be lost, a value that is no text."""
    form = recognise(names, DataColumns(), "data")
    with pytest.raises(UsageError, match=f"line 9: {words}"):
        form.record(row, "line 9")

"""Conversations are written by the tokenizer's template, and the assistant's part is found exactly or not at all."""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError
from lorameter.trial.data.chat import ChatTemplate, read_conversation

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""As most models write it: nothing marks what the assistant says."""
TURNS = (
    ("system", "be kind"),
    ("user", "Größe?"),
    ("assistant", " 3 m "),
    ("user", "user"),
    ("assistant", "assistant"),
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }};"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3: the last answer gets a block of its own, and earlier ones lose theirs
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | trim }}</>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITHOUT_TOOLS = "{% for m in messages if m['role'] != 'tool' %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
UNASKED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
"""Without a word for the prompt of a generation, and without a token that ends a turn."""


def answers(tokenizer, template, conversation):
    tokenizer.chat_template = template
    chat = ChatTemplate(tokenizer, "mine")
    text = chat.text(conversation)
    return [text[begin:end] for begin, end in chat.answers(conversation, text)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, [" 3 m <|im_end|>", "assistant<|im_end|>"]),
        (MARKED, [" 3 m ;", "assistant;"]),
        (UNASKED, [" 3 m \n", "assistant\n"]),
        (STRICT.replace("== 'system'", "== 'never'"), ["3 m</>", "assistant</>"]),
    ],
    ids=["found", "marked", "without a prompt", "stripped"],
)
def test_answers_are_what_the_assistant_says_and_what_ends_it(tokenizer, chat, template, expected):
    """Of every turn, and nothing of the header before it, which may hold the same word, nor the space behind it."""
    assert answers(tokenizer, template, chat(*TURNS)) == expected


def test_a_turn_that_is_written_differently_later_is_refused(tokenizer, chat):
    """The prefix property does not hold: the tokens of the answer cannot be located. With one turn they can."""
    with pytest.raises(
        UsageError, match=r"line 7: the chat template of mine writes message 3 differently.*loss = \"all\""
    ):
        answers(tokenizer, THINKING, chat(*TURNS))
    assert answers(tokenizer, THINKING, chat(("user", "a"), ("assistant", "b"))) == ["b</>"]
    tokenizer.chat_template = THINKING
    assert ChatTemplate(tokenizer, "mine").text(chat(*TURNS)).endswith("<think></think>assistant</>\n")


@pytest.mark.parametrize(
    ("template", "turns", "words"),
    [
        (STRICT, TURNS, "does not accept it: System role not supported"),
        (WITHOUT_TOOLS, (("user", "a"), ("tool", "xyz"), ("assistant", "b")), r"does not write message 2 \(tool\) as"),
        (CHATML.replace("{% endfor", "{{ nothing.at.all }}{% endfor"), TURNS, "does not accept it: 'nothing' is"),
        (CHATML.replace("{% endfor %}", ""), TURNS, "does not accept it: "),
        (MARKED.replace("== 'assistant'", "== 'nobody'"), TURNS, "does not mark answer 1"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_take_is_refused(tokenizer, chat, template, turns, words):
    """By the record's place, and in the template's own words; nothing is left out in silence."""
    with pytest.raises(UsageError, match=f"line 7: the chat template of mine {words}"):
        answers(tokenizer, template, chat(*turns))


def test_a_prompt_ends_where_the_model_goes_on(tokenizer, chat):
    """Before the last answer; what stands behind that is no part of it."""
    tokenizer.chat_template = CHATML
    template = ChatTemplate(tokenizer, "mine")
    prompt, answer = template.prompt(chat(("user", "a"), ("assistant", "b"), ("user", "c")))
    assert (prompt, answer) == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b")
    with pytest.raises(UsageError, match="line 7: the assistant begins"):
        template.prompt(chat(("assistant", "b")))


ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def read_turns(*messages):
    return read_conversation(list(messages), "line 3", "messages")


def test_both_spellings_are_one():
    """role and content, from and value, with the nulls that a table fills up with."""
    expected = (ASK, ANSWER)
    shared = {"from": "gpt", "value": "b", "role": None, "content": None}
    assert read_turns(ASK, ANSWER).messages == expected
    assert read_turns({"from": "human", "value": "a"}, shared).messages == expected
    system, tool = {"role": "system", "content": "s"}, {"role": "tool", "content": "t"}
    assert read_turns(system, ASK, tool, ANSWER).messages == (system, ASK, tool, ANSWER)


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
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "message 2: tool_calls: tool calls"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "message 2: function_call: tool calls"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "message 2: content = .*: a text is expected"),
        ({"role": "user", "content": "\udc00"}, "message 2: content = .*: a text"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_name(message, words):
    """With the line, the number of the message and what to do."""
    with pytest.raises(UsageError, match=f"line 3: messages, {words}"):
        read_turns(ASK, message, ANSWER)

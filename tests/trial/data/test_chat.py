"""Tests of conversations: the tokenizer's template renders them, and the assistant's answers are located or refused."""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError
from lorameter.trial.data.chat import ChatTemplate, read_conversation

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of most models, which does not mark the assistant's text."""
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
        (STRICT.replace("== 'system'", "== 'never'"), ["3 m</>", "assistant</>"]),
    ],
    ids=["found", "marked", "stripped"],
)
def test_answers_are_the_assistant_s_text_and_the_end_of_its_turn(tokenizer, chat, template, expected):
    """The header before the answer, which may contain the same word, and the whitespace after it do not count."""
    assert answers(tokenizer, template, chat(*TURNS)) == expected


def test_a_turn_that_is_rendered_differently_when_others_follow_is_refused(tokenizer, chat):
    """The generated tokens are then unknown. A single turn can be located."""
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
        (CHATML.replace("{% endfor %}", ""), TURNS, "does not accept it: "),
        (MARKED.replace("== 'assistant'", "== 'nobody'"), TURNS, "does not mark answer 1"),
    ],
)  # fmt: skip
def test_a_record_that_the_template_does_not_accept_is_refused(tokenizer, chat, template, turns, words):
    """The error names the record and has the template's own message."""
    with pytest.raises(UsageError, match=f"line 7: the chat template of mine {words}"):
        answers(tokenizer, template, chat(*turns))


def test_a_prompt_ends_before_the_last_answer(tokenizer, chat):
    """Later messages are not part of the prompt."""
    tokenizer.chat_template = CHATML
    template = ChatTemplate(tokenizer, "mine")
    prompt, answer = template.prompt(chat(("user", "a"), ("assistant", "b"), ("user", "c")))
    assert (prompt, answer) == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b")
    with pytest.raises(UsageError, match="line 7: the assistant begins"):
        template.prompt(chat(("assistant", "b")))


ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def read_turns(*messages):
    return read_conversation(list(messages), "line 3", "messages")


def test_both_spellings_of_message_keys_are_equivalent():
    """The keys role/content and from/value are equivalent, also with the nulls of a table."""
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
        ({"role": "assistant", "content": {"text": "x"}}, "message 2: content = .*: a text is expected"),
        ({"role": "narrator", "content": "x"}, "message 2: role = 'narrator': not known. Known: system"),
        ({"from": "gpt", "value": None}, "message 2: value = null"),
        ({"speaker": "a", "text": "x"}, "message 2 = .*role and content, or from and value"),
        ("b", "message 2 = 'b'"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "message 2: tool_calls: tool calls"),
        ({"role": "user", "content": "\udc00"}, "message 2: content = .*: a text"),
    ],
)  # fmt: skip
def test_a_message_without_text_or_role_is_refused(message, words):
    """The error gives the line, the number of the message and the remedy."""
    with pytest.raises(UsageError, match=f"line 3: messages, {words}"):
        read_turns(ASK, message, ANSWER)

"""Tests of records as tokens and labels: the tokens do not depend on the loss setting."""

from __future__ import annotations

import pytest

from lorameter.studies.workload import Workload
from lorameter.trial.data.tokens import IGNORED, Encoder, mark_tokens

RECORDS = {
    "dolly": ({"instruction": "ask", "context": "ctx", "response": "it is é so"}, "it is é so"),
    "completion": ({"prompt": "What is", "completion": " it now"}, " it now"),
    "joined": ({"prompt": "pre", "completion": "fix"}, "fix"),
    "empty": ({"prompt": "a", "completion": ""}, ""),
}


def encode(tokenizer, record, **changes):
    return Encoder(tokenizer, Workload(**changes)).labelled(record)


def labelled_tokens(labels):
    return [label for label in labels if label != IGNORED]


@pytest.mark.parametrize("name", RECORDS)
def test_the_answer_has_labels_and_the_prompt_has_none(tokenizer, name):
    """The labels include the EOS token; with a loss on all text every token but the first has a label."""
    record, answer = RECORDS[name]
    ids, labels = encode(tokenizer, record, loss="answer")
    assert tokenizer.decode(labelled_tokens(labels)) == f"{answer}</s>"
    assert labels[-len(labelled_tokens(labels)) :] == labelled_tokens(labels)
    every, shifted = encode(tokenizer, record)
    assert every == ids == [ids[0], *shifted[1:]]
    assert Encoder(tokenizer, Workload()).whole(record) == ids[:-1]


def test_conversations_have_the_tokens_of_their_template(tokenizer, chat):
    """No token is added before or after the rendered text."""
    conversation = chat(("user", "a"), ("assistant", "bcd"), ("user", "e"), ("assistant", "f"))
    ids, labels = encode(tokenizer, conversation, loss="answer")
    rendered = tokenizer.apply_chat_template(list(conversation.messages), return_dict=False)
    assert ids == encode(tokenizer, conversation)[0] == rendered
    assert tokenizer.decode(labelled_tokens(labels)) == "bcd</s>f</s>"
    prompt, example = Encoder(tokenizer, Workload()).example(conversation)
    assert ids[: len(prompt)] == prompt
    assert (example.reference, tokenizer.decode(prompt)) == ("f", example.prompt)


def test_tokens_that_overlap_the_answer_are_marked():
    """A token that begins in the prompt, and each of several tokens of one character, are marked."""
    offsets = [(0, 0), (0, 2), (2, 5), (5, 6), (5, 6), (6, 8), (8, 9), (9, 9)]
    assert mark_tokens(offsets, [(3, 6), (8, 9)]) == [False, False, True, True, True, False, True, False]
    assert mark_tokens(offsets, []) == [False] * 8
    assert mark_tokens(offsets, [(4, 4)]) == [False] * 8

"""Tests of token files: isolated records, token counts, and one hash for all variants.

Tests of tokenizers: the model's own, or UTF-8 bytes for random weights without a tokenizer.

Tests of records as tokens and labels: the tokens do not depend on the loss setting.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.studies.workload import Workload
from lorameter.trial.data.tokens import IGNORED, Encoder, load_tokenizer, mark_tokens, prepare

SMALL = Workload(sequence_length=64, train_sequences=12, held_out_records=6, held_out_sequences=4, prompt_tokens=8)


def test_packed_records_start_at_zero_and_without_a_label(tmp_path):
    """Positions restart with each record, and the first token of a record has no label."""
    summary = prepare(SMALL, tmp_path)
    tensors = load_file(summary.path)
    starts = tensors["train.position_ids"] == 0
    assert starts.sum() > 12
    assert (tensors["train.labels"][starts] == IGNORED).all()
    assert (tensors["train.labels"][~starts] == tensors["train.input_ids"][~starts]).all()
    steps = np.diff(tensors["train.position_ids"], axis=1)
    assert ((steps == 1) | (tensors["train.position_ids"][:, 1:] == 0)).all()
    assert summary.padded_tokens == 0
    assert summary.real_tokens == 12 * 64


def test_padding_is_counted_and_has_no_label(tmp_path):
    """A padded row has one record; its padding is masked, unlabelled and counted."""
    summary = prepare(dataclasses.replace(SMALL, layout="padded", sequence_length=512), tmp_path)
    tensors = load_file(summary.path)
    mask = tensors["train.attention_mask"]
    assert summary.real_tokens == mask.sum()
    assert summary.padded_tokens == (mask == 0).sum() > 0
    assert (tensors["train.labels"][mask == 0] == IGNORED).all()


def test_joined_rows_have_the_tokens_of_packed_ones_without_isolation(tmp_path):
    """Positions run over the whole row, and each token but the first is predicted from the token before it."""
    joined, packed = (prepare(dataclasses.replace(SMALL, layout=layout), tmp_path) for layout in ("joined", "packed"))
    joined_rows, packed_rows = load_file(joined.path), load_file(packed.path)
    assert (joined_rows["train.input_ids"] == packed_rows["train.input_ids"]).all()
    assert (joined_rows["train.position_ids"] == np.arange(64)).all()
    starts = joined_rows["train.labels"] == IGNORED
    records = joined_rows["train.input_ids"] == joined_rows["train.input_ids"][0, 0]  # the BOS token
    assert starts[:, 0].all()
    assert not (starts & ~records)[:, 1:].any()


def test_the_hash_is_that_of_the_content(tmp_path):
    """Equal workloads have equal hashes; another seed, layout or length changes the hash."""
    first = prepare(SMALL, tmp_path)
    assert prepare(SMALL, tmp_path).hash == first.hash
    for change in ({"data_seed": 1}, {"prompt_format": "write-instruction"}, {"sequence_length": 32}):
        assert prepare(dataclasses.replace(SMALL, **change), tmp_path).hash != first.hash


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_loss_on_answers_labels_their_tokens_alone(tmp_path, layout):
    """Only tokens of answers have labels; the labels are counted, and every sequence has at least one."""
    workload = dataclasses.replace(SMALL, layout=layout, sequence_length=128)
    every, answers = (prepare(dataclasses.replace(workload, loss=loss), tmp_path) for loss in ("all", "answer"))
    assert answers.hash != every.hash
    tensors = load_file(answers.path)
    labels = tensors["train.labels"]
    assert answers.loss_tokens == (labels != IGNORED).sum()
    assert ((labels == IGNORED) | (labels == tensors["train.input_ids"])).all()
    assert (labels != IGNORED).any(axis=1).all()
    assert 0 < answers.loss_tokens < every.loss_tokens < every.real_tokens


def test_sequences_without_an_answer_are_left_out_and_counted(tmp_path):
    """Sequences without an answer are dropped and counted, since their mean loss is 0/0; data whose sequences all end
    before an answer is refused."""
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": "p" * length, "completion": "answer"} for length in (300, 5, 400, 10, 500, 20, 8, 9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    workload = dataclasses.replace(SMALL, data=str(path), loss="answer", held_out_records=3, data_seed=1)
    summary = prepare(workload, tmp_path)
    labels = load_file(summary.path)["train.labels"]
    assert summary.without_loss > 0
    assert (labels != IGNORED).any(axis=1).all()
    assert summary.train_sequences == len(labels)
    endless = dataclasses.replace(SMALL, layout="padded", sequence_length=16, loss="answer", prompt_tokens=8)
    with pytest.raises(UsageError, match="loss = 'answer': no training sequence holds a token of an answer"):
        prepare(endless, tmp_path)


def test_held_out_records_are_not_trained_on(tmp_path):
    """The marker of each record occurs in one split only."""
    path = tmp_path / "records.jsonl"
    rows = [{"instruction": f"<{index}>", "context": "", "response": "x" * 40} for index in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    workload = dataclasses.replace(SMALL, data=str(path), held_out_sequences=50, train_sequences=50)
    tensors = load_file(prepare(workload, tmp_path).path)
    source = catalogue.resolve("tiny-llama")
    tokenizer, _ = load_tokenizer(source, vocab_size=shapes.shape(source).vocab_size)
    text = {split: tokenizer.decode(tensors[f"{split}.input_ids"].flatten()) for split in ("train", "held_out")}
    seen = {split: {index for index in range(10) if f"<{index}>" in text[split]} for split in text}
    assert len(seen["held_out"]) == workload.held_out_records
    assert seen["train"]
    assert not seen["train"] & seen["held_out"]


def test_too_few_records_for_a_sequence_are_refused(tmp_path):
    """The error names the file."""
    path = tmp_path / "short.jsonl"
    path.write_text('{"instruction": "a", "context": "", "response": "b"}')
    with pytest.raises(UsageError, match=r"short\.jsonl.*not enough records"):
        prepare(dataclasses.replace(SMALL, data=str(path)), tmp_path)


def test_too_few_held_out_tokens_for_a_request_are_refused(tmp_path):
    """The error gives the number of available tokens and the settings to change."""
    with pytest.raises(UsageError, match=r"request_batch = 4096, prompt_tokens = 8: the held-out records hold \d+ tok"):
        prepare(dataclasses.replace(SMALL, request_batch=4096, held_out_records=1), tmp_path)


def test_the_byte_tokenizer_encodes_utf8():
    """Ids are the UTF-8 bytes of the text without additions, and decoding restores the text."""
    tokenizer, substituted = load_tokenizer(catalogue.resolve("tiny-llama"), vocab_size=320)
    text = "né  日本\n\t'x' " + "".join(map(chr, range(1, 300)))
    ids = tokenizer(text).input_ids
    assert (ids, substituted) == (list(text.encode()), False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)


def test_bytes_replace_only_the_tokenizer_of_a_random_model(monkeypatch, tmp_path):
    """A random model whose tokenizer cannot be loaded gets the byte tokenizer, which is reported; for real weights this
    is an error."""
    monkeypatch.setattr(catalogue, "hub_answers", lambda repository: False)
    tokenizer, substituted = load_tokenizer(catalogue.resolve("random:someone/absent-model"), vocab_size=32000)
    assert (tokenizer("a").input_ids, substituted) == ([97], True)
    with pytest.raises(UsageError, match="hub cannot be reached"):
        load_tokenizer(catalogue.resolve("someone/absent-model"), vocab_size=32000)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320}))
    with pytest.raises(UsageError, match="tokenizer cannot be loaded"):
        load_tokenizer(catalogue.resolve(str(tmp_path)), vocab_size=320)


def test_vocabularies_must_fit(converted, words):
    """A tokenizer with more tokens than the model is refused, both the model's own and the byte tokenizer."""
    with pytest.raises(UsageError, match=f"has {len(words)} tokens and the model 100"):
        load_tokenizer(catalogue.resolve(str(converted)), vocab_size=100)
    with pytest.raises(UsageError, match="cannot hold the 259 tokens"):
        load_tokenizer(catalogue.resolve("tiny-llama"), vocab_size=258)


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
    assert Encoder(tokenizer, Workload()).encode(record)[0] == ids[:-1]


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

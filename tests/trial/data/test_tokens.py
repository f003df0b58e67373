"""The token stream: isolated records, counted tokens, one hash for all."""

from __future__ import annotations

import dataclasses
import gzip
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from harness.errors import UsageError
from harness.models import catalogue, shapes
from harness.studies.workload import Workload
from harness.trial.data.synthetic import synthetic_records
from harness.trial.data.tokenizers import load_tokenizer
from harness.trial.data.tokens import IGNORED, hash_tensors, prepare, prompt_and_target

SMALL = Workload(sequence_length=64, train_sequences=12, held_out_records=6, held_out_sequences=4, prompt_tokens=8)


def test_packed_records_start_at_zero_and_without_a_label(tmp_path):
    """Positions restart with each record, and its first token is never a target of the record before."""
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


def test_padding_is_counted_apart_and_has_no_label(tmp_path):
    """One record a row; what is not a record is masked, unlabelled and not a real token."""
    summary = prepare(dataclasses.replace(SMALL, layout="padded", sequence_length=512), tmp_path)
    tensors = load_file(summary.path)
    mask = tensors["train.attention_mask"]
    assert summary.real_tokens == mask.sum()
    assert summary.padded_tokens == (mask == 0).sum() > 0
    assert (tensors["train.labels"][mask == 0] == IGNORED).all()


def test_the_hash_is_that_of_the_content(tmp_path):
    """Equal workloads have equal hashes; another seed, format or length has another."""
    first = prepare(SMALL, tmp_path)
    assert prepare(SMALL, tmp_path).hash == first.hash == hash_tensors(load_file(first.path))
    for change in ({"data_seed": 1}, {"prompt_format": "write-instruction"}, {"sequence_length": 32}):
        assert prepare(dataclasses.replace(SMALL, **change), tmp_path).hash != first.hash


def test_held_out_records_are_not_trained_on(tmp_path):
    """No record is in both splits: the marker of each record shows in one of them only."""
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


def test_both_prompt_formats_hold_their_parts():
    """Answering takes instruction and context to the response; writing takes the response to the instruction."""
    record = {"instruction": "ASK", "context": "CTX", "response": "ANSWER", "category": "c"}
    prompt, target = prompt_and_target(record, "answer-instruction")
    assert "ASK" in prompt
    assert "CTX" in prompt
    assert target == "ANSWER"
    prompt, target = prompt_and_target(record, "write-instruction")
    assert "ANSWER" in prompt
    assert "ASK" not in prompt
    assert target == "ASK"


def test_synthetic_records_are_seeded_and_of_dollys_schema():
    """The same seed gives the same records, with dolly's four columns."""
    first, again, other = (next(synthetic_records(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert set(first) == {"instruction", "context", "response", "category"}


def test_the_real_data_set_is_read(dolly, tmp_path):
    """databricks-dolly-15k as .jsonl.gz, all of its records known."""
    summary = prepare(dataclasses.replace(SMALL, data=str(dolly), sequence_length=256), tmp_path)
    assert "15011 records" in summary.data
    assert not summary.synthetic


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"instruction": "a", "response": "b"}', "no column 'context'"),
        ("not json", "cannot be read"),
        ('{"instruction": "a", "context": "", "response": "b"}', "not enough records"),
    ],
)
def test_data_that_cannot_serve_is_refused(tmp_path, content, words):
    """The message names the file and what is wrong with it."""
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(gzip.compress(content.encode()))
    with pytest.raises(UsageError, match=words) as caught:
        prepare(dataclasses.replace(SMALL, data=str(path)), tmp_path)
    assert "bad.jsonl.gz" in str(caught.value)

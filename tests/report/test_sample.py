"""Tests of `lorameter sample`: the decoded answers of a run, next to the record's own text."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lorameter.cli import main
from lorameter.records import store
from lorameter.report.sample import read_samples

EXAMPLES = [{"prompt": "Input: 4\n", "reference": "What is 2 + 2?"}, {"prompt": "Input: sky\n", "reference": "Blue?"}]
END = 257


@pytest.fixture
def run(write_run, small_study, tmp_path):
    """A run of tiny-llama (a token is a byte) in which `plain` has one complete and one truncated answer."""
    workload = dataclasses.replace(small_study.workload, open_ended_tokens=5)

    def answered(record):
        answers = {"answer_0": [*b"Two?", END], "answer_1": [*b"Colou"], "base_answer_0": [*b"0"]}
        plain = record.name == "plain" and record.role == "variant"
        return record.replaced(tokens=answers) if plain else record

    study = dataclasses.replace(small_study, workload=workload)
    path = write_run("a", {"plain": [1.0, 1.0], "nf4": [1.0, 1.0]}, study=study, change=answered)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tokens"] = {"examples": EXAMPLES}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return store.read_run(str(path), tmp_path / "runs")


def test_answers_are_shown_with_prompt_and_reference(run):
    """Answers are in the order of the prompts and marked as complete or not; an answer that was not generated before
    training is None."""
    first, second = read_samples(run, "plain", replicate=1)
    assert (first.prompt, first.reference, first.base_answer, first.trained) == (
        "Input: 4\n",
        "What is 2 + 2?",
        "0",
        "Two?",
    )
    assert (first.tokens, first.ended) == (5, True)
    assert (second.base_answer, second.trained, second.ended) == (None, "Colou", False)
    assert read_samples(run, "plain", count=1) == (first,)


@pytest.mark.parametrize("variant", ["plain", "nf4"])
def test_a_run_without_answers_is_refused_with_the_remedy(write_run, capsys, variant):
    """The error has the study key that keeps answers and the command, and does not list variants as "none"."""
    path = write_run("bare", {"plain": [1.0, 1.0], "nf4": [1.0, 1.0]})
    assert main(["sample", str(path), variant]) == 2
    said = capsys.readouterr().err
    assert "run bare kept no answers" in said
    assert (
        "Write open_ended_tokens = 64 in [workload] of the study and measure it again with the phase generate" in said
    )
    assert "none" not in said

"""A study on a user's own data, from its plan to its report."""

from __future__ import annotations

import json

import pytest

from lorameter.cli import main

STUDY = """
title = "own"

[workload]
model = "tiny-llama"
data = "chats.jsonl"
loss = "answer"
sequence_length = 64
batch_size = 2
train_sequences = 16
held_out_records = 4
held_out_sequences = 2
prompt_tokens = 8
new_tokens = 4

[protocol]
replicates = 1
warmup_steps_min = 1
warmup_steps_max = 2
turns = 2
steps_per_turn = 2
phases = ["train"]
step_timeout_s = 120
allow_disturbed = true

[[variant]]
name = "plain"
r = 4
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """One with a study and its data, in which the commands are given."""
    turns = [
        [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{number}!"}]
        for number in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    (tmp_path / "own.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plan_says_what_the_data_is(folder, capsys):
    """As text and as JSON; of records of this program's own it says nothing."""
    words = "chats.jsonl, 60 records of messages; loss on the answers alone"
    assert main(["run", "own.toml", "--dry-run", "--runs-dir", "runs"]) == 0
    assert f"data    {words}" in capsys.readouterr().out
    assert main(["run", "own.toml", "--dry-run", "--json", "--runs-dir", "runs"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == words
    assert main(["run", "own.toml", "--dry-run", "--json", "--data", "synthetic", "--runs-dir", "runs"]) == 0
    assert "data" not in json.loads(capsys.readouterr().out)

"""Tests of a study on a user's own data, from its plan to its report."""

from __future__ import annotations

import json

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


def test_a_plan_describes_the_data(tmp_path, monkeypatch, capsys):
    """The plan has a line on the user's data; a plan on generated records has none."""
    turns = [
        [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{number}!"}]
        for number in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    (tmp_path / "own.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    words = ["run", "own.toml", "--dry-run", "--json", "--runs-dir", "runs"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["data"] == (
        "chats.jsonl, 60 records of messages; loss on the answers alone"
    )
    assert main([*words, "--data", "synthetic"]) == 0
    assert "data" not in json.loads(capsys.readouterr().out)

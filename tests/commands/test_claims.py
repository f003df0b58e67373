"""`lorameter claims` of a study about an engine that was really measured, on a model of the catalogue."""

from __future__ import annotations

import json

import pytest

from lorameter import cli

SMALL = """
extends = "gradient-checkpointing"
[workload]
sequence_length = 64
batch_size = 2
train_sequences = 32
held_out_records = 4
held_out_sequences = 2
[protocol]
replicates = 2
turns = 2
warmup_steps_min = 1
warmup_steps_max = 2
peak_replicates = 2
allow_disturbed = true
"""


@pytest.mark.selftest
def test_a_ready_study_is_measured_and_judged(tmp_path, capsys):
    """Tiny llama, with checkpointing and without: a verdict with ratio, interval, machine, versions and proof; what a
    process holds refutes no saving."""
    path, runs = tmp_path / "small.toml", str(tmp_path / "runs")
    path.write_text(SMALL)
    code = cli.main(["run", str(path), "--runs-dir", runs, "--json"])
    run = json.loads(capsys.readouterr().out)
    assert code in (0, 4)  # the machine may be too busy for the control
    assert run["trials"] == {"ok": 12}
    assert cli.main(["claims", run["run"], "--runs-dir", runs, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    cost, memory = (claim["parts"][0] for claim in found["claims"])
    assert cost["verdict"] in ("supported", "refuted", "inconclusive")
    assert cost["low"] < cost["ratio"] < cost["high"]
    assert (cost["about"], cost["by"], cost["replicates"]) == ("checkpointed / plain", 0.2, 2)
    assert memory["verdict"] in ("supported", "not judged")
    assert "resident peak" in memory["reason"]
    engine = found["engine"]
    assert engine["versions"]["transformers"]
    assert "1 thread a process" in engine["machine"]
    assert [(one["path"], one["found"], one["without"]) for one in engine["proof"]] == [
        ("checkpointing", "active", False)
    ]
    assert all(claim["source"].startswith("https://huggingface.co/docs/transformers/") for claim in found["claims"])

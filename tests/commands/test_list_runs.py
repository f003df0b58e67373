"""`lorameter list runs`: how each run stands, what it found, and how large it is."""

import json

import pytest

from lorameter import cli
from lorameter.verdicts.baselines import accept


@pytest.fixture
def called(write_run, capsys):
    """The command on a sound, an interrupted and a damaged run."""
    path = write_run("sound", {"plain": [1.0, 1.1, 1.2], "nf4": [1.0, 1.1, 1.2]})
    write_run("cut", {"plain": [1.0, 1.1], "nf4": [1.0, 1.2]}, status="interrupted")
    write_run("torn", {"plain": [1.0, 1.1], "nf4": [1.0, 1.2]})
    (path.parent / "torn" / "manifest.json").write_text("{")
    accept("sound", path.parent)

    def run(*words):
        assert cli.main(["list", "runs", *words, "--runs-dir", str(path.parent)]) == 0
        return capsys.readouterr().out

    return run


def test_every_run_has_study_state_verdict_and_size(called):
    """As JSON with the keys that there were before."""
    document = json.loads(called("--json"))
    rows = {row["run"]: row for row in document["runs"]}
    assert set(rows) == {"sound", "cut", "torn"}
    sound = rows["sound"]
    assert (sound["study"], sound["status"], sound["verdict"], sound["baseline"]) == (
        "small",
        "complete",
        "valid",
        True,
    )
    assert sound["size_bytes"] > 1000
    assert sound["trials"] == {"ok": 9}
    assert (rows["cut"]["status"], rows["cut"]["verdict"], rows["cut"]["baseline"]) == ("interrupted", "invalid", False)
    assert rows["torn"]["status"] == "damaged"
    assert "cannot be read" in rows["torn"]["title"]


def test_the_table_says_the_same(called):
    """A row a run, and why one could not be read."""
    text = called()
    row = next(line for line in text.splitlines() if "sound" in line)
    assert all(word in row for word in ("small", "complete", "baseline", "valid", "KiB"))
    assert "torn: " in text

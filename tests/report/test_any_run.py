"""Tests that any run gives any report: failures, missing metrics, one replicate, no reference, truncated lines."""

from __future__ import annotations

import json
import shutil

import pytest

from lorameter.cli import main
from tests.constructed import RUNS

ODD = (
    "failed one-replicate without-reference killed given-up noisy fewer-variants fallback cold resumed ab-failed "
    "swept-in-part"
).split()


@pytest.mark.parametrize("run", ODD)
@pytest.mark.parametrize("options", ["--json", "--markdown --verbose"])
def test_a_run_in_any_state_is_reported(run, options, capsys):
    """Each format reports the whole run; the exit code gives its state, and standard error stays empty."""
    code = main(["report", run, "--runs-dir", str(RUNS), *options.split()])
    out, err = capsys.readouterr()
    assert code in (0, 1, 3, 4, 5)
    assert out.strip()
    assert not err
    if options == "--json":
        assert json.loads(out)["schema"] == 2


def test_a_truncated_line_loses_its_trial_and_is_reported(tmp_path, capsys):
    """When the process was killed during a write, every format reports the complete records and the damage."""
    path = tmp_path / "cut"
    shutil.copytree(RUNS / "sound", path)
    lines = (path / "trials.jsonl").read_text().splitlines(keepends=True)
    (path / "trials.jsonl").write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    for options in ([], ["--markdown"], ["--json"]):
        assert main(["report", str(path), *options]) == 4
        assert "damaged-lines" in capsys.readouterr().out

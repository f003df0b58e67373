"""Tests of which environment variables of the user may affect the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_variables_of_the_user_change_no_test(tmp_path):
    """A test that uses the default folder of runs passes although the documented variables name another folder and
    executor, and writes nothing there."""
    runs = tmp_path / "runs"
    test = f"{HERE / 'test_pytest_plugin.py'}::test_the_plan_runs_once_for_all_tests_and_is_on_disk"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        env={**os.environ, "LORAMETER_RUNS": str(runs), "LORAMETER_EXECUTOR": "nothing"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert not runs.exists()

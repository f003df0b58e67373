"""DataFrames: typed, whole, and imported only by those who ask."""

import subprocess
import sys
from pathlib import Path

import pytest

import harness
from harness.errors import UsageError
from harness.results.columns import TABLES
from harness.results.frames import DTYPES, Frames

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "tests" / "golden" / "runs"
DAMAGED = RUNS.parent / "damaged"


def load_readable():
    """All golden runs; one is of a newer schema, of which a table has no place for what is not known."""
    with pytest.warns(UserWarning, match="schema 6"):
        return harness.load_all(RUNS)


def test_every_column_has_the_type_that_its_kind_says():
    """Of a run, of none, and of many below each other."""
    for frames in (harness.load("sound", RUNS), load_readable(), harness.load_all(RUNS / "none")):
        for table, columns in TABLES.items():
            frame = getattr(frames, table)
            assert {name: str(kind) for name, kind in frame.dtypes.items()} == {
                column.name: DTYPES[column.kind] for column in columns
            }


def test_all_runs_of_a_folder_stand_below_each_other():
    """Each as it is by itself."""
    every, one = load_readable(), harness.load(RUNS / "sound")
    assert set(every.trials["run"]) == {path.name for path in RUNS.iterdir()} - {"newer"}
    mine = every.samples[every.samples["run"] == "sound"].reset_index(drop=True)
    assert mine.equals(one.samples)
    assert set(every.unreadable) == {"newer"}


def test_a_run_that_cannot_be_read_hides_no_other_and_is_named():
    """With its reason, and with a warning."""
    with pytest.warns(UserWarning, match="left out") as warned:
        frames = harness.load_all(DAMAGED)
    assert set(frames.unreadable) == {path.name for path in DAMAGED.iterdir()} - {"no-records"}
    assert len(warned) == len(frames.unreadable)
    assert "schema 99" in frames.unreadable["newer-schema"]
    assert "unreadable: " in repr(frames)


def test_no_run_of_that_name_is_refused():
    """As by every command."""
    with pytest.raises(UsageError, match="not found"):
        harness.load("nothing", RUNS)


def test_an_interval_of_one_replicate_is_missing():
    """And is not zero wide."""
    frames = harness.load("one-replicate", RUNS)
    steps = frames.estimates[frames.estimates["metric"] == "step_time_s"]
    assert steps["low"].isna().all()
    assert steps["interval"].isna().all()
    assert isinstance(frames, Frames)


def test_importing_the_package_loads_no_pandas():
    """Every measuring process imports it."""
    code = "import sys, harness; assert not {'pandas', 'numpy', 'msgspec'} & set(sys.modules); harness.load"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = harness.lode


def test_every_column_is_documented():
    """docs/results.md has each with what it says, and no other."""
    text = (ROOT / "docs" / "results.md").read_text()
    for table, columns in TABLES.items():
        section = text.partition(f"### `{table}`\n")[2].partition("\n### ")[0].partition("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        assert rows == [f"| `{one.name}` | {DTYPES[one.kind]} | {one.says} |" for one in columns]

"""`pytest benchmarks/ --lorameter-resume=RUN`: what a replayed run leaves in pytest-benchmark's file and on screen."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

OURS = ("name", "fullname", "group", "param", "params", "extra_info")
"""What the plugin says of a benchmark; statistics and options are pytest-benchmark's own."""
COMMITTED = "2026-11-25_amd-epyc-2cpu_lora-or-qlora"


def section(text):
    """The part of pytest's output that the plugin writes."""
    found = re.search(r"^[=-]+ lorameter [=-]+\n(.*?)^(?:[=-]{3,} |$\n+[=-]{3,})", text, re.M | re.S)
    return found[1] if found else ""


def replayed(run, suite_of_benchmarks, tmp_path, *options):
    """Exit code, the plugin's part of the screen, and what is ours in the file."""
    target = tmp_path / "saved.json"
    words = ["--lorameter-runs-dir=runs", f"--lorameter-resume={run}", f"--benchmark-json={target}", *options]
    outcome = suite_of_benchmarks(*words)
    if not target.exists():  # pytest-benchmark writes none where every test failed
        return outcome, None
    saved = json.loads(target.read_text(encoding="utf-8"))
    document = {
        "keys": sorted(saved),
        "machine": {key: sorted(saved["machine_info"][key]) for key in ("lorameter",)},
        "lorameter": saved["lorameter"],
        "benchmarks": [{key: one[key] for key in OURS} | {"data": one["stats"]["data"]} for one in saved["benchmarks"]],
    }
    return outcome, document


@pytest.mark.parametrize("run", ["cold", "failed", "diverged", "control-failed"])
def test_what_a_replayed_run_leaves(run, suite_of_benchmarks, holds, tmp_path):
    """Samples to the bit, trial boundaries, other metrics and checks in the file, and the report on screen."""
    outcome, document = replayed(run, suite_of_benchmarks, tmp_path)
    holds(f"pytest {run}", dataclasses.replace(outcome, out=section(outcome.out), err=""))
    holds(f"pytest {run} --json", dataclasses.replace(outcome, out=json.dumps(document), err=""))


def test_a_committed_run_is_replayed(suite_of_benchmarks, holds, tmp_path, filled):
    """The run of the README, one variant of it."""
    manifest = json.loads((filled / "reports" / COMMITTED / "manifest.json").read_text(encoding="utf-8"))
    shutil.copytree(filled / "reports" / COMMITTED, tmp_path / "runs" / manifest["run"])
    run = tmp_path / "runs" / manifest["run"]
    outcome, document = replayed(run, suite_of_benchmarks, tmp_path, "-k", "qlora-nf4-r16")
    holds("pytest committed --json", dataclasses.replace(outcome, out=json.dumps(document), err=""))


def test_a_saved_file_is_a_side(lorameter, suite_of_benchmarks, tmp_path):
    """What was saved here compares with the run that it was saved of as the run with itself."""
    replayed("cold", suite_of_benchmarks, tmp_path, "-k", "train")
    saved = json.loads((tmp_path / "saved.json").read_text(encoding="utf-8"))
    manifest = json.loads(Path("runs/cold/manifest.json").read_text(encoding="utf-8"))
    names = saved["machine_info"]["lorameter"]
    saved["machine_info"]["lorameter"] = {key: manifest["provenance"][key] for key in names}
    (tmp_path / "saved.json").write_text(json.dumps(saved), encoding="utf-8")
    sides = [json.loads(lorameter(f"compare {base} cold --metric step_time_s --runs-dir runs --json").out)
             for base in ("cold", tmp_path / "saved.json")]  # fmt: skip
    assert [row["ratio"] for row in sides[0]["comparisons"]] == [row["ratio"] for row in sides[1]["comparisons"]]

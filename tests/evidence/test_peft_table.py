"""Tests of the analysis of PEFT's published table on a small constructed history: counts, noise and ranking."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "evidence" / "peft_table.py"
RESULTS = Path("method_comparison", "MetaMathQA", "results")


def result(experiment, created, accuracy, step_time, *, torch="2.7.1", memory=20 << 30, lr=1e-4, old_names=False):
    """Return a result file in the format of PEFT's comparison, with two evaluations and a test."""
    return {
        "run_info": {
            "experiment_name": experiment, "created_at": created,
            "train_config": {"seed": 0, "optimizer_kwargs": {"lr": lr}},
            "peft_config": {"peft_type": "LORA", "r": 8, "peft_version": torch},
        },
        "train_info": {
            ("cuda_memory_max" if old_names else "accelerator_memory_max"): memory,
            "train_time": 2 * step_time, "status": "success",
            "metrics": [
                {"step": 250, "valid accuracy": 0.1, "train time": step_time / 2},
                {"step": 500, "valid accuracy": 0.2, "train time": step_time / 2},
                {"step": 500, "test accuracy": accuracy},
            ],
        },
        "meta_info": {
            "system_info": {"gpu": "L40S"},
            "package_info": {"torch-version": torch, "transformers-version": "4.52.4", "peft-version": "0.16"},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The output folder of the program for a history of four commits, and its printed text."""
    checkout = tmp_path_factory.mktemp("peft")
    folder = checkout / RESULTS
    folder.mkdir(parents=True)

    def git(*words):
        who = ("-c", "user.name=t", "-c", "user.email=t@t")
        subprocess.run(["git", "-C", checkout, *who, *words], check=True, capture_output=True)

    def commit(**files):
        for name, content in files.items():
            path = folder / f"{name}.json"
            path.unlink() if content is None else path.write_text(json.dumps(content))
        git("add", "-A")
        git("commit", "-q", "-m", "results")

    first = {name: result(f"m/{name}", f"2025-06-17T0{i}:00", 0.5 - 0.1 * i, 100.0, old_names=True)
             for i, name in enumerate("abc")}  # fmt: skip
    second = {name: result(f"m/{name}", f"2025-06-19T0{i}:00", 0.5 - 0.1 * i + 0.01, 80.0)
              for i, name in enumerate("abc")}  # fmt: skip
    git("init", "-q")
    commit(**first)
    commit(**second)
    rewritten = {**second["a"], "note": "reformatted"}
    commit(a=rewritten)
    commit(c=None, d=result("m/d", "2025-06-20T00:00", 0.5, 80.0, lr=1e-3))
    out = tmp_path_factory.mktemp("out")
    done = subprocess.run([sys.executable, PROGRAM, checkout, "--out", out], check=True, capture_output=True, text=True)
    return out, " ".join(done.stdout.split())


def test_runs_are_counted_once(report):
    """A rewritten file is not a run, and a replaced experiment is named with its changes."""
    out, printed = report
    assert "4 commits bring 8 result files: 7 runs of 4 experiments, 3 repeated, up to 2 times" in printed
    assert "1 files are rewrites of a run" in printed
    assert "m/d replaced m/c in" in printed
    assert "changed: train.optimizer_kwargs.lr" in printed
    assert pd.read_csv(out / "runs.csv").rewrite.sum() == 1
    assert (out / "report.html").read_text().startswith("<!doctype html>")


def test_noise_is_that_of_the_repeats(report):
    """For three repeats that differ by 0.01, the limit is t(0.975, 3) times 0.01; step times differ by a factor of
    1.25."""
    _, printed = report
    assert "1.25 to 1.25, median 1.25" in printed
    assert f"they must differ by {stats.t.ppf(0.975, 3) * 0.01:.4f}" in printed
    assert "50% of train time is no training step" in printed
    assert "seed noise: unknown, because every run has seed 0" in printed


def test_the_ranking_shows_separable_results(report):
    """0.51 and 0.50 are not separable by any noise, 0.50 and 0.41 are; the test items are judged by their binomial
    variance."""
    out, printed = report
    ranking = pd.read_csv(out / "ranking.csv")
    assert list(ranking.experiment) == ["m/a", "m/d", "m/b"]
    assert list(ranking.numerical) == [False, True, False]
    needed = stats.norm.ppf(0.975) * math.sqrt((0.5 * 0.5 + 0.41 * 0.59) / 1319)
    assert list(ranking["test items"]) == [False, needed < 0.09, False]
    assert list(ranking.best) == [1, 1, 3]
    assert list(ranking.worst) == [2, 2, 3]
    assert "2 members" not in printed
    assert "Open under each kind of noise: numerical: 1; test items: 1" in printed

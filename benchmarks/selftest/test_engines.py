"""The ready studies about engines that need no GPU, whole: each is measured on a small model, and two on a script; each
engine is seen to run where it should, and each promise has a verdict or the reason why not.

What the verdicts are is a matter of the machine; that they rest on proof is not.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harness import cli

pytestmark = pytest.mark.selftest

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
JUDGED = ("supported", "refuted", "inconclusive")
LEAST = {"packing": 1.0, "gradient-checkpointing": 1.0}
"""On any machine a token takes less time where nothing is computed for padding, and a step more where the forward pass
is computed twice: ratios of speed and of time that are above one."""
QUICK = ("--replicates", "3", "--allow-disturbed", "--json")
SCRIPTS = {
    "gradient-checkpointing": "python train.py {--gradient_checkpointing}",
    "fused-optimizer": "python train.py --optim {adamw_torch|adamw_torch_fused}",
}


def contradicted(part):
    """The verdicts that its ratio speaks against: an interval lies beyond what was promised, or short of it."""
    beyond = part["ratio"] > 1 + part["by"]
    keeps = beyond == (part["rule"] == "faster")
    return ("refuted",) if keeps else ("supported",)


@pytest.fixture
def judged(tmp_path, monkeypatch, capsys):
    """A function: measure a study, and what is said of its claims."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAMETER_RUNS", str(tmp_path / "runs"))

    def judge(*words):
        assert cli.main(["run", *words, *QUICK]) in (0, 4)
        run = json.loads(capsys.readouterr().out)
        assert set(run["trials"]) == {"ok"}
        cli.main(["claims", run["run"], "--json"])
        found = json.loads(capsys.readouterr().out)
        for claim in found["claims"]:
            part = claim["parts"][0]
            with capsys.disabled():
                print(f"\n{' '.join(words)}: {claim['says']}: {claim['verdict']}: {part['reason']}")
        return found

    return judge


@pytest.mark.parametrize("name", ["packing", "gradient-checkpointing", "compile", "fused-optimizer"])
def test_a_ready_study_is_judged_on_a_small_model(judged, name):
    """Its engine ran in its variant alone; times are judged, and memory of a CPU is never refuted."""
    found = judged(name, "--model", "tiny-llama")
    assert {one["found"] for one in found["engine"]["proof"]} == {"active"}
    for claim in found["claims"]:
        part = claim["parts"][0]
        if part["metric"] == "optimizer_time_s":  # told apart in scripts alone
            assert part["verdict"] == "not judged"
        elif part["metric"] == "peak_memory":
            assert part["verdict"] in ("supported", "not judged")
        else:
            assert part["verdict"] in JUDGED
            assert part["ratio"] > LEAST.get(name, 0.0)
            assert part["verdict"] not in contradicted(part)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_asked_the_same(judged, tmp_path, name):
    """The one of the page on engines, with what differs in braces."""
    page = PAGE.read_text(encoding="utf-8")
    (tmp_path / "train.py").write_text(re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[0])
    found = judged(name, "--command", SCRIPTS[name], "--steps", "12")
    assert {one["found"] for one in found["engine"]["proof"]} == {"active"}
    timed = [claim["parts"][0] for claim in found["claims"] if claim["parts"][0]["metric"] != "peak_memory"]
    assert timed
    assert {part["verdict"] for part in timed} <= set(JUDGED)

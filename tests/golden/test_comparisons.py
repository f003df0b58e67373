"""One side beside another: `compare`, `gate` in its formats, and what was accepted as the baseline."""

import dataclasses
import json
from pathlib import Path

import pytest

COMMITTED = "reports/2026-11-25_amd-epyc-2cpu_lora-or-qlora"
PAIRS = (
    "sound slower",
    "sound faster",
    "sound again",
    "sound another-day",
    "sound sound",
    "sound larger",
    "sound noisy",
    "sound cold",
    "sound fewer-variants",
    "sound without-reference",
    "sound other-machine",
    "sound other-variant",
    "sound one-replicate",
    "one-replicate one-replicate",
    "sound failed",
    "sound diverged",
    "fallback noticed",
    "control-failed sound",
    "sound control-unsure",
    "sound interrupted",
    "killed sound",
    "sound disturbed",
    "schema-1 schema-3",
    "schema-2 sound",
    "sound newer",
    "sound swept",
    "sound ab",
    "sound files/sound.json",
    "files/sound.json slower",
    "files/foreign.json files/foreign-slower.json",
    "files/foreign.json sound",
    "baseline sound",
    f"{COMMITTED} {COMMITTED}",
)
OPTIONS = (
    "sound other-machine --force",
    "sound other-variant --force",
    "sound slower --all-metrics",
    "sound slower --metric step_time_s",
    "sound slower --metric 'held_*' --metric '*peak*'",
    "sound slower --metric no_such_metric",
    "sound slower --metric step_time_s --all-metrics",
)
GATED = (
    "sound slower",
    "sound another-day",
    "sound again",
    "sound faster --policy files/lenient.toml",
    "sound again --policy files/lenient.toml",
    "sound slower --policy files/strict.toml",
    "sound other-machine",
    "sound failed",
    "sound newer",
    "baseline sound",
    "files/foreign.json files/foreign-slower.json",
)
REFUSED = (
    *(f"gate sound slower --policy files/{policy}.toml" for policy in ("mistyped", "impossible", "not-toml", "absent")),
    "gate sound slower --json --format github",
)
FORMS = {"text": "", "json": " --json"}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("sides", [*PAIRS, *OPTIONS])
def test_how_two_sides_compare(sides, form, lorameter, holds):
    """Verdicts with their reasons, differences that forbid them, and the exit code are those that were kept."""
    line = f"compare {sides} --runs-dir runs{form}"
    holds(line, lorameter(line))


@pytest.mark.parametrize("form", ["text", "json", "markdown", "github"])
@pytest.mark.parametrize("sides", GATED)
def test_what_a_gate_says(sides, form, lorameter, holds):
    """Each format, and the exit code under the policy, is that which was kept."""
    line = f"gate {sides} --runs-dir runs --format {form}"
    holds(line, lorameter(line))


def test_a_gate_writes_the_summary_of_a_job(lorameter, holds, monkeypatch, tmp_path):
    """What GitHub shows of a job is the Markdown that was kept."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    found = lorameter("gate sound slower --runs-dir runs --format github")
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    holds("gate sound slower summary", dataclasses.replace(found, out=summary))


@pytest.mark.parametrize("line", REFUSED)
def test_what_a_gate_refuses(line, lorameter, holds):
    """A policy that cannot be is refused with the message and the exit code that were kept."""
    line = f"{line} --runs-dir runs"
    holds(line, lorameter(line))


@pytest.mark.parametrize("line", ["accept sound", "accept failed", "accept ab", "accept killed", "accept swept"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_which_runs_are_accepted(line, form, lorameter, holds, own_folder):
    """A sound run is; its place in the file and the refusal of any other are those that were kept."""
    line = f"{line} --runs-dir runs{form}"
    holds(line, timeless(lorameter(line)))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_word_baseline(form, lorameter, holds, own_folder):
    """It stands for the accepted run of the same fingerprint and study, which a later one replaces."""
    assert lorameter("accept sound --runs-dir runs").code == 0
    holds(f"accept again after sound{form}", timeless(lorameter(f"accept again --runs-dir runs{form}")))
    line = f"compare baseline slower --runs-dir runs{form}"
    holds(line, lorameter(line))
    line = f"compare baseline other-machine --runs-dir runs{form}"
    holds(line, lorameter(line))
    kept = json.loads(Path("runs/baselines.json").read_text(encoding="utf-8"))
    assert [sorted(one) for one in kept["baselines"]] == [["accepted_unix_s", "fingerprint", "run", "study"]]


def timeless(outcome):
    """Without the time of the day."""
    if not outcome.out.startswith("{"):
        return outcome
    document = json.loads(outcome.out)
    for one in filter(None, (document["accepted"], document["replaced"])):
        one["accepted_unix_s"] = 0.0
    return dataclasses.replace(outcome, out=json.dumps(document))

"""What is said of a run by itself: `report`, `claims` and `list runs`."""

import pytest

RUNS = (
    "sound again slower faster another-day cold larger noisy fewer-variants without-reference one-replicate "
    "two-replicates control-failed control-unsure failed diverged fallback noticed full-checks blocks interrupted "
    "given-up killed disturbed other-variant schema-1 schema-2 schema-3 newer ab ab-improved ab-unsure ab-failed "
    "ab-alike swept swept-in-part"
).split()
REPORTS = ("2026-11-24_amd-epyc-2cpu_llama2-lora-parameters", "2026-11-25_amd-epyc-2cpu_lora-or-qlora")
LINES = [
    *(f"report {run} --runs-dir runs" for run in RUNS),
    *(f"report {run} --runs-dir reports" for run in REPORTS),
    "report runs/sound --runs-dir reports",
    "claims swept --runs-dir runs",
    "claims swept-in-part --runs-dir runs",
    "claims sound --runs-dir runs",
    "claims killed --runs-dir runs",
    "claims ab --runs-dir runs",
    "claims newer --runs-dir runs",
    *(f"claims {run} --runs-dir reports" for run in REPORTS),
    "list runs --runs-dir runs",
    "list runs --runs-dir damaged",
    "list runs --runs-dir none",
]


@pytest.mark.parametrize("form", ["", " --json"], ids=["text", "json"])
@pytest.mark.parametrize("line", LINES)
def test_what_is_said_of_a_run(line, form, lorameter, holds):
    """Text and document, messages and exit code are those that were kept."""
    holds(line + form, lorameter(line + form))

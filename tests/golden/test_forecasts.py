"""What is said before or without a measurement, on a constructed machine: `estimate`, `run --dry-run`, `profile`."""

from pathlib import Path

import pytest

FORMS = {"text": "", "json": " --json"}
LINES = (
    "estimate lora-or-qlora:qlora-nf4-r16 --runs-dir none",
    "estimate lora-or-qlora:qlora-nf4-r16 --runs-dir runs",
    "estimate lora-or-qlora:lora-r16 --model random:llama2-7b --runs-dir none",
    "estimate llama2-lora-parameters:r=512 --model random:smollm2-135m --runs-dir none",
    "estimate lora-or-qlora:qlora-nf4-r16 --profile card --runs-dir none",
    "estimate lora-or-qlora:qlora-nf4-r16 --profile no-such --runs-dir none",
    "estimate lora-or-qlora:no-such --runs-dir none",
    "estimate lora-or-qlora:lora-r16 --model llama2-7b --gpu 16GiB --max-batch --runs-dir runs",
    "estimate llama2-lora-parameters:r=512 --model llama2-70b --gpu 'RTX 4090' --runs-dir none",
    "estimate lora-or-qlora:qlora-nf4-r16 --model random:smollm2-135m --max-batch --runs-dir none",
    "run lora-or-qlora --dry-run --runs-dir none",
    "run lora-or-qlora --dry-run --runs-dir runs",
    "run lora-or-qlora --dry-run --runs-dir reports",
    "estimate lora-or-qlora:qlora-nf4-r16 --runs-dir reports",
    "run lora-or-qlora --dry-run --effort rigorous --phase train --variant qlora-nf4-r16 --runs-dir none",
    "run lora-or-qlora --dry-run --interleave replicates --replicates 2 --runs-dir none",
    "run lora-or-qlora --dry-run --interleave shared-base --runs-dir none",
    "run lora-or-qlora --dry-run --model random:llama2-7b --runs-dir none",
    "run llama2-lora-parameters --dry-run --model random:smollm2-135m --runs-dir none",
)
PROFILES = ("explained", "unexplained", "unseen")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("line", LINES)
def test_what_a_measurement_would_take(line, form, lorameter, holds, internals, monkeypatch):
    """Bytes by kind, the order of the plan, its level, and refusals are those that were kept."""
    internals.on_the_constructed_machine(monkeypatch)
    holds(line + form, lorameter(line + form))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("attempt", ["", " --try oversubscription"], ids=["seen", "tried"])
def test_what_a_profile_shows(name, attempt, form, lorameter, holds, internals, monkeypatch):
    """The account of a step, ceilings and findings of stored facts are those that were kept."""
    internals.on_the_constructed_machine(monkeypatch)
    internals.with_profile(monkeypatch, Path(f"profiles/{name}.json"))
    line = f"profile lora-or-qlora:qlora-nf4-r16{attempt} --runs-dir runs{form}"
    holds(f"{line} {name}", lorameter(line))

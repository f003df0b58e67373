"""What it takes to measure a run again: versions, command, study and seed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from harness.records.store import Run
from harness.studies.study_file import builtin_studies
from harness.verdicts.software import BETWEEN, facts_of

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def how_to_repeat(run: Run) -> str:
    """The lines to type, each said what it is; what is not known of a run is said as such."""
    return "\n".join(_lines(run))


def _lines(run: Run) -> Iterator[str]:
    manifest, provenance = run.manifest, facts_of(run.manifest.provenance, run.records)
    libraries = {name: version for name, version in provenance.get("libraries", {}).items() if version}
    known = {name: libraries[name] for name in LIBRARIES if name in libraries and BETWEEN not in libraries[name]}
    python, git = provenance.get("python", "unknown"), provenance.get("git", {})
    yield f"# Python {python}; {_revision(git)}; seed {manifest.seed}"
    if known:
        yield "pip install " + " ".join(shlex.quote(f"{name}=={version}") for name, version in known.items())
    study = str(manifest.study.get("name", ""))
    named = study if study in builtin_studies() else f"{study}.toml"
    if named != study:
        yield "# the study is no built-in one: write it from the values below, or from `study` in the run's manifest"
    words = ["lorameter", "run", named]
    if profile := manifest.study.get("profile"):
        words += ["--profile", str(profile)]
    for phase in manifest.phases:
        words += ["--phase", phase]
    for name in manifest.selection:
        words += ["--variant", name]
    words += ["--replicates", str(manifest.study.get("protocol", {}).get("replicates", ""))]
    yield shlex.join(words)
    yield f"# study: {json.dumps(manifest.study, ensure_ascii=False, sort_keys=True)}"


def _revision(git: dict[str, object]) -> str:
    commit = git.get("commit")
    changes = " with local changes" if git.get("dirty") else ""
    return f"commit {commit}{changes}" if commit else "no repository"

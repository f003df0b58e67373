"""The commands that reproduce a run: versions, command, study and seed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from lorameter.errors import UsageError
from lorameter.machine.provenance import MAIN_LIBRARIES
from lorameter.records import codec
from lorameter.records.store import Run
from lorameter.run.plan import PRESENT
from lorameter.studies.script import SIDE
from lorameter.studies.study_file import builtin_studies, load_study
from lorameter.verdicts.same_training import BETWEEN, training_facts

STUDY_SUFFIX = ".toml"
NOT_BUILT_IN = "# the study is not built in: write it from the values below, or from `study` in the run's manifest"
OVERRIDES = {
    "workload": {"model": "--model", "data": "--data"},
    "protocol": {
        "precision": "--precision",
        "max_minutes": "--max-minutes",
        "allow_disturbed": "--allow-disturbed",
        "on": "--on",
        "sites": "--sites",
        "mixed": "--mixed",
    },
}
"""Keys of a study that a command line can replace, with their options."""


def reproduction_steps(run: Run) -> str:
    """The commands to type, with comments, which name unknown facts of the run."""
    manifest, provenance = run.manifest, training_facts(run.manifest.provenance, run.records)
    libraries = {name: version for name, version in provenance.get("libraries", {}).items() if version}
    known = {name: libraries[name] for name in MAIN_LIBRARIES if name in libraries and BETWEEN not in libraries[name]}
    python, git = provenance.get("python", "unknown"), provenance.get("git", {})
    changes = " with local changes" if git.get("dirty") else ""
    revision = f"commit {git['commit']}{changes}" if git.get("commit") else "no repository"
    install = shlex.join(["pip", "install", *(f"{name}=={version}" for name, version in known.items())])
    lines = (
        _comment(f"Python {python}; {revision}; seed {manifest.seed}"),
        *([install] if known else []),
        *(_ab_commands(run) if manifest.sides else _variant_commands(run)),
        f"# study: {json.dumps(manifest.study, ensure_ascii=False, sort_keys=True)}",
    )
    return "\n".join(lines)


def _comment(text: str) -> str:
    """A shell comment. Line breaks in texts of a run are escaped, because the next line would be a command."""
    return f"# {' '.join(text.splitlines())}"


def _variant_commands(run: Run) -> Iterator[str]:
    """The commands for a run that compares variants."""
    study_word, overrides = _study(run)
    if study_word.endswith(STUDY_SUFFIX):
        yield NOT_BUILT_IN
    profile = run.manifest.study.get("profile")
    words = ["lorameter", "run", study_word, *(["--profile", str(profile)] if profile else [])]
    yield shlex.join([*words, *overrides, *_selected(run)])


def _ab_commands(run: Run) -> Iterator[str]:
    """The commands for an A/B, with the words that name both sides."""
    manifest = run.manifest
    sides = {name: manifest.sides.get(name) or {} for name in ("base", "candidate")}
    for name, side in sides.items():
        yield _comment(f"{name}: {side.get('label', 'unknown')}")
    if manifest.policy:
        yield f"# judged by --policy FILE, of {json.dumps(manifest.policy, ensure_ascii=False, sort_keys=True)}"
    specs = {name: _spec(side) for name, side in sides.items()}
    if not all(specs.values()):
        yield "# the run does not record the arguments of its sides"
        return
    study_word, overrides = _study(run)
    suffix = "-command" if {side["kind"] for side in manifest.sides.values()} == {SIDE} else ""
    sided = [word for name, spec in specs.items() for word in (f"--{name}{suffix}", spec)]
    command = str(manifest.study["variants"][0].get("command") or "")
    if suffix or (command and study_word.endswith(STUDY_SUFFIX)):  # a command is itself the study
        words = ["ab", *([] if suffix else ["--command", command]), *sided, *_script_options(run)]
        words += _selected(run, variants=False)
    else:
        if study_word.endswith(STUDY_SUFFIX):
            yield NOT_BUILT_IN
        is_calibration = all(side.get("kind") == PRESENT for side in sides.values())
        rows = max(int(side.get("slowdown_rows") or 0) for side in sides.values())
        words = ["calibrate", study_word] if is_calibration else ["ab", study_word, *sided]
        words += [
            *overrides,
            *(["--inject-rows", str(rows)] if rows else []),
            *_selected(run, phases=not is_calibration),
        ]
    yield shlex.join(["lorameter", *words])


def _spec(side: Mapping[str, Any]) -> str:
    """The words that name a side again: a commit instead of a branch, which may have moved."""
    if side.get("kind") == "revision":
        return str(((side.get("facts") or {}).get("git") or {}).get("commit") or side.get("spec") or "")
    return str(side.get("spec") or (side.get("kind") == PRESENT and PRESENT) or "")


def _script_options(run: Run) -> list[str]:
    """The folder of a command, and the number of its timed steps."""
    protocol, variant = run.manifest.study.get("protocol", {}), run.manifest.study["variants"][0]
    steps = int(protocol.get("turns", 0)) * int(protocol.get("steps_per_turn", 0))
    where = ["--cwd", str(variant["cwd"])] if variant.get("cwd") else []
    return [*where, *(["--steps", str(steps)] if steps else [])]


def _selected(run: Run, *, variants: bool = True, phases: bool = True) -> list[str]:
    """The selected phases and variants, and the number of replicates."""
    manifest = run.manifest
    words = [word for phase in manifest.phases for word in ("--phase", phase)] if phases else []
    words += [word for name in manifest.selection for word in ("--variant", name)] if variants else []
    return [*words, "--replicates", str(manifest.study.get("protocol", {}).get("replicates", ""))]


def _study(run: Run) -> tuple[str, list[str]]:
    """The word that names the study, and the options that replaced its values."""
    stored, words = run.manifest.study, list[str]()
    name = str(stored.get("name", ""))
    if name not in builtin_studies():
        return f"{name}{STUDY_SUFFIX}", words
    try:
        written = codec.to_json(load_study(name, profile=stored.get("profile") or None))
    except UsageError:  # a profile that no longer exists in this version
        return name, words
    for table, keys in OVERRIDES.items():
        for key, option in keys.items():
            value = stored.get(table, {}).get(key)
            if value is not None and value is not False and value != written[table].get(key):
                given = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                words += [option] if value is True else [option, given]
    return name, words

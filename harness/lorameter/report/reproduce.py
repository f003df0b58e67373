"""The commands that reproduce a run: versions, command, study and seed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from lorameter.errors import UsageError
from lorameter.machine.provenance import MAIN_LIBRARIES
from lorameter.records import codec
from lorameter.records.record import SIDES, Side
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
        "until_decided": "--until-decided",
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
    pinned = {name: libraries[name] for name in MAIN_LIBRARIES if name in libraries and BETWEEN not in libraries[name]}
    python, git = provenance.get("python", "unknown"), provenance.get("git", {})
    changes = " with local changes" if git.get("dirty") else ""
    revision = f"commit {git['commit']}{changes}" if git.get("commit") else "no repository"
    install = shlex.join(["pip", "install", *(f"{name}=={version}" for name, version in pinned.items())])
    sides = {name: manifest.sides.get(name) or {} for name in SIDES} if manifest.sides else {}
    lines = (
        _comment(f"Python {python}; {revision}; seed {manifest.seed}"),
        *([install] if pinned else []),
        *(_comment(f"{name}: {side.get('label', 'unknown')}") for name, side in sides.items()),
        *([f"# judged by --policy FILE, of {_to_json(manifest.policy)}"] if manifest.policy and sides else []),
        *_commands(run, sides),
        f"# study: {_to_json(manifest.study)}",
    )
    return "\n".join(lines)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _comment(text: str) -> str:
    """A shell comment. Line breaks in texts of a run are escaped, because the next line would be a command."""
    return f"# {' '.join(text.splitlines())}"


def _commands(run: Run, sides: Mapping[Side, Mapping[str, Any]]) -> Iterator[str]:
    """The command that measures the run again, with a comment if it needs a file; or why there is none."""
    specs = {name: _spec(side) for name, side in sides.items()}
    if not all(specs.values()):
        yield "# the run does not record the arguments of its sides"
        return
    stored, protocol = run.manifest.study, run.manifest.study.get("protocol", {})
    study, overrides = _study(run)
    phases = [word for phase in run.manifest.phases for word in ("--phase", phase)]
    variants = [word for name in run.manifest.selection for word in ("--variant", name)]
    replicates = ["--replicates", str(protocol.get("replicates", ""))]
    if sides and not protocol.get("until_decided") and not protocol.get("precision"):
        replicates.append("--no-until-decided")  # an A/B's default
    kinds, variant = {side["kind"] for side in sides.values()}, stored["variants"][0]
    suffix = "-command" if kinds == {SIDE} else ""
    side_options = [word for name, spec in specs.items() for word in (f"--{name}{suffix}", spec)]
    if not sides:
        profile = ["--profile", str(stored["profile"])] if stored.get("profile") else []
        words = ["run", study, *profile, *overrides, *phases, *variants, *replicates]
    elif suffix or (variant.get("command") and study.endswith(STUDY_SUFFIX)):  # a command is itself the study
        command = [] if suffix else ["--command", str(variant["command"])]
        folder = ["--cwd", str(variant["cwd"])] if variant.get("cwd") else []
        count = int(protocol.get("turns", 0)) * int(protocol.get("steps_per_turn", 0))
        steps = ["--steps", str(count)] if count else []
        words = ["ab", *command, *side_options, *folder, *steps, *phases, *replicates]
    else:
        rows = max(int(side.get("slowdown_rows") or 0) for side in sides.values())
        injected = ["--inject-rows", str(rows)] if rows else []
        words = ["ab", study, *side_options, *overrides, *injected, *phases, *variants, *replicates]
        if kinds == {PRESENT}:
            words = ["calibrate", study, *overrides, *injected, *variants, *replicates[:2]]
    if study in words and study.endswith(STUDY_SUFFIX):
        yield NOT_BUILT_IN
    yield shlex.join(["lorameter", *words])


def _spec(side: Mapping[str, Any]) -> str:
    """The words that name a side again: a commit instead of a branch, which may have moved."""
    if side.get("kind") == "revision":
        return str(((side.get("facts") or {}).get("git") or {}).get("commit") or side.get("spec") or "")
    return str(side.get("spec") or (side.get("kind") == PRESENT and PRESENT) or "")


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
                value_text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                words += [option] if value is True else [option, value_text]
    return name, words

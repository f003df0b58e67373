"""What a report says of variants that are commands: each command, and what was seen of its training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lorameter.records.record import TrialRecord
from lorameter.records.store import Run
from lorameter.report.blocks import Line, say
from lorameter.studies.script import SIDE
from lorameter.studies.study import Study
from lorameter.studies.variant import Variant

SOURCES = {"trainer": "a Trainer", "loop": "a loop that names its steps", "optimizer": "updates of an optimizer"}
"""Where steps were seen, in words."""


def describe_scripts(run: Run, study: Study) -> Iterator[Line]:
    """A line for each command; of an A/B of commands one for each side."""
    sides = {name: side for name, side in run.manifest.sides.items() if side.get("kind") == SIDE}
    for variant in study.variants:
        for side in sides or {"": {}}:
            records = [one for one in run.records if one.name == variant.name and (not side or one.side == side)]
            command = str(sides[side].get("spec")) if side else variant.command
            yield say(f"{side or variant.name}: {command}{_where(variant)}{_seen(records)}", label="command")


def _where(variant: Variant) -> str:
    said = [f"cwd {variant.cwd}"] if variant.cwd else []
    said += [f"{name}={value}" for name, value in variant.env.items()]
    said += [f"python {variant.python}"] if variant.python else []
    return f" ({', '.join(said)})" if said else ""


def _seen(records: Iterable[TrialRecord]) -> str:
    """By what its steps were seen and how many there were; nothing where it did not come to that."""
    begun = [record for record in records if "source" in record.tokens]
    if not begun:
        return ""
    sources = sorted({SOURCES.get(str(one.tokens["source"]), str(one.tokens["source"])) for one in begun})
    steps = sorted({int(one.values["training_steps"]) for one in begun if "training_steps" in one.values})
    taken = f", {' or '.join(map(str, steps))} steps a trial" if steps else ""
    return f"; steps seen by {' and '.join(sources)}{taken}"

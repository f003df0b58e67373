"""The report of a campaign: its steps and claims as text and as a document, and the stored files."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from benchmarks.gpu.claim import Claim, Decision, Verdict
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.steps import Step
from lorameter.machine.provenance import Machine

SCHEMA = 1
MAX_KEPT_BYTES = 2**20
"""The largest stored file; larger files are recordings or tokens, which can be regenerated."""
KEPT_OF_A_RUN = ("manifest.json", "trials.jsonl", "checks.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """The content of a report."""

    machine: Machine
    origin: str
    """Machine, libraries and commit in one line."""
    rehearsed: bool
    steps: tuple[Step, ...]
    journal: Journal
    decisions: tuple[tuple[Claim, Decision], ...]

    @property
    def begun(self) -> str:
        """The date on which the first step started."""
        first = min((entry.begun_unix_s for entry in self.journal.entries), default=time.time())
        return time.strftime("%Y-%m-%d", time.gmtime(first))


def document(campaign: Campaign) -> dict[str, Any]:
    """Return the campaign as JSON data, from which `docs/gpu.md` is generated."""
    return {
        "schema": SCHEMA,
        "date": campaign.begun,
        "device": campaign.machine.device_name,
        "driver": campaign.machine.driver,
        "origin": campaign.origin,
        "steps": [asdict(entry) for entry in campaign.journal.entries],
        "claims": [
            {"name": claim.name, "says": claim.says, **asdict(decision)} for claim, decision in campaign.decisions
        ],
    }


def text(campaign: Campaign) -> str:
    """Return the report: the machine, each step with its time, and the table of claims at its end."""
    lines = [campaign.origin, *_about(campaign), "", "Steps", *_steps(campaign), "", "Claims"]
    lines += [
        f"  {decision.verdict:12} {claim.name}: {claim.says}\n               {decision.evidence}"
        for claim, decision in campaign.decisions
    ]
    counts = Counter(decision.verdict for _, decision in campaign.decisions)
    lines.append("; ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict)))
    return "\n".join(lines) + "\n"


def _about(campaign: Campaign) -> list[str]:
    if campaign.rehearsed:
        return [
            f"There is no GPU here ({campaign.machine.device_name}): every step was rehearsed as far as it can be, "
            "nothing was measured, and nothing is claimed."
        ]
    units = sorted({entry.unit for entry in campaign.journal.entries})
    sources = sorted({entry.sources for entry in campaign.journal.entries})
    lines = [f"GPU {campaign.machine.device_name}, driver {campaign.machine.driver}"]
    if len(units) > 1:
        lines.append(f"on {len(units)} GPUs of this name, one after the other")
    if len(sources) > 1:
        lines.append(f"by {len(sources)} states of the sources: steps from before a change were not repeated")
    return lines


def _steps(campaign: Campaign) -> list[str]:
    lines = []
    for one in campaign.steps:
        attempts = campaign.journal.attempts(one.name)
        if not attempts:
            lines.append(f"  {'not begun':10} {'':>7}  {one.name}: {one.asks}")
            continue
        last, took = attempts[-1], sum(entry.took_s for entry in attempts)
        why = f" – {last.last_line}" if last.outcome in ("failed", "stopped") and last.last_line else ""
        skipped = f" – {one.skipped}" if last.outcome == "rehearsed" else ""
        lines.append(f"  {last.outcome:10} {took:6.0f} s  {one.name}: {one.asks}{skipped}{why}")
    return lines


def write(campaign: Campaign, reports: Path, state: Path) -> Path:
    """Write the report, its document, the output of each step and the records of its runs; return the folder."""
    device = re.sub(r"[^a-z0-9]+", "-", campaign.machine.device_name.lower()).strip("-")
    folder = reports / f"{campaign.begun}_{device}_gpu"
    (folder / "outputs").mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(text(campaign), encoding="utf-8")
    (folder / "campaign.json").write_text(json.dumps(document(campaign), indent=1) + "\n", encoding="utf-8")
    runs = [path for path in (state / "runs").glob("*/*/*") if path.name in KEPT_OF_A_RUN]
    for path in [*(state / "outputs").glob("*"), *runs]:
        if 0 < path.stat().st_size <= MAX_KEPT_BYTES:
            place = folder / path.relative_to(state)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return folder


def decide(claims: Sequence[Claim], evidence: Any, *, rehearsed: bool) -> tuple[tuple[Claim, Decision], ...]:
    """Return the decision on each claim; a rehearsal decides none."""
    nothing = Decision(verdict="not decided", evidence="no GPU: this was a rehearsal")
    return tuple((claim, nothing if rehearsed else claim.decide(evidence)) for claim in claims)

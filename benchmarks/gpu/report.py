"""The report of a campaign: its steps and claims as a document and as text, and the stored files."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from benchmarks.gpu.claim import Claim, Decision, Verdict
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.steps import STEPS
from lorameter.machine.provenance import Machine

SCHEMA = 1
MAX_STORED_BYTES = 2**20
"""Size of the largest stored file; larger files are recordings or tokens, which can be regenerated."""
STORED_RUN_FILES = ("manifest.json", "trials.jsonl", "checks.jsonl")


def build_document(
    machine: Machine, origin: str, journal: Journal, decisions: Sequence[tuple[Claim, Decision]]
) -> dict[str, Any]:
    """Return the campaign as JSON data, from which the report and `docs/gpu.md` are generated.

    Args:
        machine: the machine with its GPU.
        origin: machine, libraries and commit in one line.
        journal: the attempts at the steps; the first one gives the date.
        decisions: the claims with the decision on each.
    """
    begun = min((entry.begun_unix_s for entry in journal.entries), default=time.time())
    return {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%d", time.gmtime(begun)),
        "device": machine.device_name,
        "driver": machine.driver,
        "origin": origin,
        "steps": [asdict(entry) for entry in journal.entries],
        "claims": [{"name": claim.name, "says": claim.says, **asdict(decision)} for claim, decision in decisions],
    }


def format_text(campaign: dict[str, Any], *, rehearsed: bool) -> str:
    """Return the report: the machine, each step with its time, and the table of claims at its end."""
    lines, entries = [campaign["origin"]], campaign["steps"]
    gpus, harnesses = (len({entry[name] for entry in entries}) for name in ("gpu_uuid", "harness"))
    if rehearsed:
        lines.append(
            f"There is no GPU here ({campaign['device']}): every step was rehearsed as far as it can be, nothing was "
            "measured, and nothing is claimed."
        )
    else:
        lines.append(f"GPU {campaign['device']}, driver {campaign['driver']}")
    if gpus > 1:
        lines.append(f"on {gpus} GPUs of this name, one after the other")
    if harnesses > 1:
        lines.append(f"by {harnesses} versions of the source code: steps before a change were not repeated")
    lines += ["", "Steps"]
    for one in STEPS:
        attempts = [entry for entry in entries if entry["step"] == one.name]
        if not attempts:
            lines.append(f"  {'not begun':10} {'':>7}  {one.name}: {one.question}")
            continue
        last, took = attempts[-1], sum(entry["took_s"] for entry in attempts)
        why = {"rehearsed": one.skipped, "done": ""}.get(last["outcome"], last["last_line"])
        lines.append(f"  {last['outcome']:10} {took:6.0f} s  {one.name}: {one.question}" + (f" – {why}" if why else ""))
    lines += ["", "Claims"]
    for claim in campaign["claims"]:
        lines.append(f"  {claim['verdict']:12} {claim['name']}: {claim['says']}\n               {claim['evidence']}")
    counts = Counter(claim["verdict"] for claim in campaign["claims"])
    lines.append("; ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict)))
    return "\n".join(lines) + "\n"


def write(campaign: dict[str, Any], reports: Path, state: Path) -> Path:
    """Write the report, its document, the output of each step and the records of its runs; return the folder."""
    device = re.sub(r"[^a-z0-9]+", "-", campaign["device"].lower()).strip("-")
    folder = reports / f"{campaign['date']}_{device}_gpu"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(format_text(campaign, rehearsed=False), encoding="utf-8")
    (folder / "campaign.json").write_text(json.dumps(campaign, indent=1) + "\n", encoding="utf-8")
    runs = [path for path in (state / "runs").glob("*/*/*") if path.name in STORED_RUN_FILES]
    for path in [*(state / "outputs").glob("*"), *runs]:
        if 0 < path.stat().st_size <= MAX_STORED_BYTES:
            place = folder / path.relative_to(state)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return folder


def decide(claims: Sequence[Claim], evidence: Any, *, rehearsed: bool) -> tuple[tuple[Claim, Decision], ...]:
    """Return the decision on each claim; a rehearsal decides none."""
    undecided = Decision(verdict="not decided", evidence="no GPU: this was a rehearsal")
    return tuple((claim, undecided if rehearsed else claim.decide(evidence)) for claim in claims)

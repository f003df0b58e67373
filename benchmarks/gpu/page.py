"""Writes `docs/gpu.md`, the table of claims and their verdicts on each GPU, from the committed reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import forecast
from benchmarks.gpu.claim import Claim
from benchmarks.gpu.steps import STEPS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpu.md"
REPORTS = ROOT / "reports"
BEGIN, END = "<!-- written by `make gpu` from here -->", "<!-- up to here -->"
FORECAST = """## What each call decides

A rehearsal by a clock, without a GPU: each step takes what is expected of it on an H100, or 1.5 times that. What is
expected is assumed; `make gpu GPU_OPTIONS=--list` prints it."""
WORDS = {"confirmed": "confirmed", "refuted": "**refuted**", "not decided": "not decided"}


def campaigns(reports: Path) -> list[dict[str, Any]]:
    """Return the documents of all campaigns in a folder of reports, the oldest first, each with its folder's name."""
    found = [
        {**json.loads(path.read_text(encoding="utf-8")), "folder": path.parent.name}
        for path in sorted(reports.glob("*_gpu/campaign.json"))
    ]
    return sorted(found, key=lambda one: (one["date"], one["folder"]))


def table(claims: Sequence[Claim], found: Sequence[dict[str, Any]]) -> str:
    """Return the table with a row for each claim and a column for each campaign."""
    heads = [f"[{one['device']}, {one['date']}](../reports/{one['folder']}/report.txt)" for one in found]
    heads = heads or ["no GPU yet"]
    lines = [_row(["claim", *heads]), _row(["---"] * (1 + len(heads)))]
    for claim in claims:
        verdicts = [_verdict(claim, one) for one in found] or ["not decided"]
        lines.append(_row([claim.says, *verdicts]))
    return "\n".join(lines)


def summary(claims: Sequence[Claim], found: Sequence[dict[str, Any]]) -> str:
    """Summarise the table in one sentence."""
    if not found:
        return f"No GPU has been measured: of {len(claims)} claims none is confirmed and none refuted."
    names = {claim.name for claim in claims}
    verdicts = [
        {decision["name"]: decision["verdict"] for decision in one["claims"] if decision["name"] in names}
        for one in found
    ]
    confirmed, refuted = (
        {name for one in verdicts for name, verdict in one.items() if verdict == wanted}
        for wanted in ("confirmed", "refuted")
    )
    return (
        f"Of {len(claims)} claims {len(confirmed - refuted)} are confirmed and nowhere refuted, {len(refuted)} refuted "
        f"somewhere, {len(names - confirmed - refuted)} not decided anywhere."
    )


def rewritten(page: str, claims: Sequence[Claim], found: Sequence[dict[str, Any]]) -> str:
    """Return the page with its generated part replaced. Raises ValueError where the page has no place for it."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE.name}: the lines {BEGIN!r} and {END!r} are expected once each")
    before, rest = page.split(BEGIN)
    parts = (BEGIN, summary(claims, found), table(claims, found), FORECAST, forecast.table(STEPS, claims), END)
    return before + "\n\n".join(parts) + rest.split(END)[1]


def rewrite(claims: Sequence[Claim]) -> None:
    """Update the page from the reports."""
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), claims, campaigns(REPORTS)), encoding="utf-8")


def _verdict(claim: Claim, campaign: dict[str, Any]) -> str:
    found = next((one for one in campaign["claims"] if one["name"] == claim.name), None)
    return "–" if found is None else WORDS[found["verdict"]]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

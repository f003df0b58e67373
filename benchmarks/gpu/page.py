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
FORECAST = """## What each call of `make gpu` decides

A simulation without a GPU: each step takes its expected time on an H100, or 1.5 times that. The expected times are
assumptions; `make gpu GPU_OPTIONS=--list` prints them."""
VERDICT_CELLS = {"confirmed": "confirmed", "refuted": "**refuted**", "not decided": "not decided"}


def read_campaigns(reports: Path) -> list[dict[str, Any]]:
    """Return the documents of all campaigns in a folder of reports, oldest first, each with the name of its folder and
    the `verdicts` on its claims by name."""
    found = []
    for path in sorted(reports.glob("*_gpu/campaign.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        verdicts = {claim["name"]: claim["verdict"] for claim in document["claims"]}
        found.append({**document, "folder": path.parent.name, "verdicts": verdicts})
    return sorted(found, key=lambda one: (one["date"], one["folder"]))


def write_table(claims: Sequence[Claim], campaigns: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table with a row for each claim and a column for each campaign."""
    headers = [f"[{one['device']}, {one['date']}](../reports/{one['folder']}/report.txt)" for one in campaigns]
    rows = [["claim", *(headers or ["no GPU yet"])]]
    rows.append(["---"] * len(rows[0]))
    for claim in claims:
        verdicts = [VERDICT_CELLS.get(one["verdicts"].get(claim.name), "–") for one in campaigns]
        rows.append([claim.says, *(verdicts or ["not decided"])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summarise(claims: Sequence[Claim], campaigns: Sequence[dict[str, Any]]) -> str:
    """Summarise the table in one sentence."""
    if not campaigns:
        return f"No GPU has been measured: of {len(claims)} claims none is confirmed and none refuted."
    verdicts = [{one["verdicts"].get(claim.name) for one in campaigns} for claim in claims]
    refuted = sum("refuted" in one for one in verdicts)
    confirmed = sum("confirmed" in one and "refuted" not in one for one in verdicts)
    return (
        f"Of {len(claims)} claims {confirmed} are confirmed and nowhere refuted, {refuted} refuted somewhere, "
        f"{len(claims) - confirmed - refuted} not decided anywhere."
    )


def update_page(page: str, claims: Sequence[Claim], campaigns: Sequence[dict[str, Any]]) -> str:
    """Return the page with its generated part replaced. Raises ValueError if the page lacks the markers of that
    part."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    simulated = forecast.write_table(STEPS, claims)
    parts = (BEGIN, summarise(claims, campaigns), write_table(claims, campaigns), FORECAST, simulated, END)
    return before + "\n\n".join(parts) + after

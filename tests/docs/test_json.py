"""Tests that docs/json.md shows the contract's document of each command, shortened."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "json.md"
EXPECTED = ROOT / "tests" / "contract" / "expected" / "json"
SHOWN = {
    "report", "run", "run-dry-run", "compare", "gate", "ab", "claims", "history", "estimate-gpu", "list-runs", "prune",
    "sample", "pack", "doctor", "accept", "profile", "parity",
}  # fmt: skip
ADDED_TO = {"gate": "compare", "ab": "gate"}
"""Documents that extend another one, whose keys are not shown again."""
LONGEST = 60


def shorten(value: Any) -> Any:
    """Shorten to the first element of each list, the beginning of each long text, and four digits of each number."""
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten(value[0])] if value else []
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[: LONGEST - 1]}…"
    return float(f"{value:.4g}") if isinstance(value, float) else value


def example_of(found: re.Match[str]) -> str:
    """Return the example for a block of the page."""
    name = found["name"]
    known = read(ADDED_TO[name]) if name in ADDED_TO else {}
    document = {key: shorten(value) for key, value in read(name).items() if key not in known}
    return f"```json {name}\n{json.dumps(document, indent=1, ensure_ascii=False)}\n```\n"


def read(name: str) -> dict[str, Any]:
    """Return the document that the contract expects."""
    document = json.loads((EXPECTED / f"{name}.json").read_text(encoding="utf-8"))
    return document.get("document", document)


def test_every_example_is_current():
    """`LORAMETER_CONTRACT=write pytest tests/docs/test_json.py` updates them."""
    page, block = PAGE.read_text(encoding="utf-8"), re.compile(r"```json (?P<name>[\w-]+)\n.*?```\n", re.DOTALL)
    assert {found["name"] for found in block.finditer(page)} == SHOWN
    current = block.sub(example_of, page)
    if os.environ.get("LORAMETER_CONTRACT") == "write":
        PAGE.write_text(current, encoding="utf-8")
    else:
        assert current == page

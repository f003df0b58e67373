"""What `--json` prints is what docs/json.md says: every kept document has the keys of its type, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from harness.cli import main
from harness.commands.documents import (
    DOCUMENTS,
    PARTS,
    ClaimsOf,
    ComparisonOf,
    GateOf,
    PlanOf,
    ReportOfAB,
    ReportOfRun,
    RunOf,
)
from harness.commands.output import SCHEMA

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "tests" / "golden" / "expected"


def kept():
    """Every document that is kept of a command, with its type."""
    types = {"claims": ClaimsOf, "compare": ComparisonOf, "gate": GateOf, "report": ReportOfRun, "run": RunOf}
    for path in sorted(KEPT.glob("*/*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))["document"]
        if document and path.parent.name in types:
            cls = types[path.parent.name]
            cls = ReportOfAB if "attribution" in document else PlanOf if "time_basis" in document else cls
            yield pytest.param(document, cls, id=f"{path.parent.name}/{path.stem}"[:80])


@pytest.mark.parametrize(("document", "cls"), list(kept()))
def test_a_kept_document_is_of_its_type(document, cls):
    """Each key with its kind of value, none missing and none more, at every depth."""
    read = msgspec.convert(document, cls)
    assert read.schema == SCHEMA


def test_numbers_stand_beside_the_cells():
    """A cell of text that holds a number has it in `values`, in base units, with the same interval."""
    document = json.loads((KEPT / "report" / "sound.json").read_text(encoding="utf-8"))["document"]
    (row,) = (row for row in document["tables"][0]["rows"] if row["name"] == "lora-r16")
    step = row["values"]["step_time_s"]
    assert row["cells"][1] == "49.7 ms [48.1, 51.4]"
    assert [f"{1000 * step[key]:.1f}" for key in ("value", "low", "high")] == ["49.7", "48.1", "51.4"]
    assert row["values"]["peak_memory_bytes"]["value"] == 441 * 2**20
    assert set(row["values"]) == {"step_time_s", "tokens_per_s", "train_loss", "held_out_loss", "peak_memory_bytes"}


def test_the_page_and_the_schema_are_those_of_the_types(capsys):
    """`lorameter list documents > docs/json.md` renews the page; each type is in it and in the JSON Schema."""
    assert main(["list", "documents"]) == 0
    assert (ROOT / "docs" / "json.md").read_text(encoding="utf-8") == capsys.readouterr().out
    assert main(["list", "documents", "--json"]) == 0
    schema = json.loads(capsys.readouterr().out)["json_schema"]
    assert {cls.__name__ for cls in (*DOCUMENTS, *PARTS)} == set(schema["$defs"])
    assert schema["$defs"]["Ratio"]["required"] == [
        "verdict", "ratio", "low", "high", "reason", "replicates", "replicates_needed", "mde80",
    ]  # fmt: skip


@pytest.mark.parametrize("cls", [ReportOfRun, GateOf])
def test_an_unknown_key_is_refused(cls):
    """Or the test above would pass whatever is printed."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"schema": 2, "surprise": 1}, cls)

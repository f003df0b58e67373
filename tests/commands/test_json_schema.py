"""What `--json` prints is what docs/json.md says: every document has the keys of its type, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from lorameter.cli import main
from lorameter.commands.json_schema import (
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
from lorameter.commands.output import SCHEMA
from tests.constructed import RUNS

ROOT = Path(__file__).parents[2]
DOCUMENTS_OF = {
    "report sound": ReportOfRun, "report cold": ReportOfRun, "report failed": ReportOfRun, "report killed": ReportOfRun,
    "report ab": ReportOfAB, "report ab-failed": ReportOfAB, "compare sound slower": ComparisonOf,
    "compare sound other-machine": ComparisonOf, "gate sound slower": GateOf, "gate ab": ReportOfAB,
    "claims swept": ClaimsOf, "claims swept-in-part": ClaimsOf, "run --resume sound": RunOf,
    "run lora-or-qlora --dry-run": PlanOf,
}  # fmt: skip


@pytest.fixture
def printed(capsys):
    """A function that gives the document of a command on the constructed runs."""

    def read(line):
        main([*line.split(), "--json", "--runs-dir", str(RUNS)])
        return json.loads(capsys.readouterr().out)

    return read


@pytest.mark.parametrize("line", DOCUMENTS_OF)
def test_a_document_is_of_its_type(line, printed):
    """Each key with its kind of value, none missing and none more, at every depth."""
    assert msgspec.convert(printed(line), DOCUMENTS_OF[line]).schema == SCHEMA


def test_numbers_stand_beside_the_cells(printed):
    """A cell of text that holds a number has it in `values`, in base units, with the same interval."""
    (row,) = (row for row in printed("report sound")["tables"][0]["rows"] if row["name"] == "lora-r16")
    step = row["values"]["step_time_s"]
    assert row["cells"][3] == "49.7 ms [48.1, 51.4]"
    assert [f"{1000 * step[key]:.1f}" for key in ("value", "low", "high")] == ["49.7", "48.1", "51.4"]
    assert row["values"]["peak_memory_bytes"]["value"] == 441 * 2**20
    assert set(row["values"]) == {"step_time_s", "tokens_per_s", "timed_loss", "held_out_loss", "peak_memory_bytes"}


def test_the_page_and_the_schema_are_those_of_the_types(capsys):
    """`lorameter list documents > docs/json.md` renews the page; each type is in it and in the JSON Schema."""
    assert main(["list", "documents"]) == 0
    assert (ROOT / "docs" / "json.md").read_text(encoding="utf-8") == capsys.readouterr().out
    assert main(["list", "documents", "--json"]) == 0
    schema = json.loads(capsys.readouterr().out)["json_schema"]
    assert {cls.__name__ for cls in (*DOCUMENTS, *PARTS)} == set(schema["$defs"])
    assert schema["$defs"]["Comparison"]["required"] == [
        "verdict", "ratio", "low", "high", "reason", "replicates", "replicates_needed", "mde80",
    ]  # fmt: skip


@pytest.mark.parametrize("cls", [ReportOfRun, GateOf])
def test_an_unknown_key_is_refused(cls):
    """Or the test above would pass whatever is printed."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"schema": 2, "surprise": 1}, cls)

"""Tests that docs/reference.md is generated from the code, is current, and explains every key of every file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lorameter.cli import main
from lorameter.commands.reference import documents_of, write_reference
from lorameter.studies.claim import Claim, ClaimPart
from lorameter.studies.engine import Engine
from lorameter.studies.protocol import Protocol
from lorameter.studies.variant import LoraVariant, PeftVariant, ScriptVariant
from lorameter.studies.workload import DataColumns, Workload
from lorameter.verdicts.gate import LimitRule, Policy

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
CLASSES = (
    *(Claim, ClaimPart, DataColumns, Engine, LimitRule, Policy, Protocol, Workload),
    *(LoraVariant, PeftVariant, ScriptVariant),
)


@pytest.fixture(scope="module")
def page():
    """The reference as generated now."""
    return write_reference()


def test_the_page_is_current(capsys):
    """The page equals the output of the command; `lorameter list keys > docs/reference.md` updates it."""
    assert main(["list", "keys"]) == 0
    assert PAGE.read_text(encoding="utf-8") == capsys.readouterr().out


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_key_is_documented_on_the_page(page, cls):
    """Each key has its name and a sentence, except the name of a variant."""
    meanings = documents_of(cls)
    for field in dataclasses.fields(cls):
        assert f"| `{field.name}` |" in page
        assert meanings.get(field.name) or field.name == "name", f"{cls.__name__}.{field.name} has no meaning"

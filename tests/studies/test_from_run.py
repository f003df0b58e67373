"""Tests of the study of a stored run."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from lorameter.errors import UsageError
from lorameter.records import store
from lorameter.studies.study_file import read_study
from tests.constructed import RUNS


def test_every_key_must_be_known():
    """An unknown key could be the difference between two sides."""
    run = store.read_run("sound", RUNS)
    assert read_study(run).name == "lora-or-qlora"
    manifest = msgspec.structs.replace(run.manifest, study={**run.manifest.study, "shade": 1})
    with pytest.raises(UsageError, match="shade"):
        read_study(dataclasses.replace(run, manifest=manifest))

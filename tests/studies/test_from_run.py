"""The study of a stored run, also of one that says more of it than this version knows."""

from __future__ import annotations

import dataclasses

import pytest

from lorameter.errors import UsageError
from lorameter.records import codec, store
from lorameter.records.forward_compat import NewerSchema
from lorameter.studies.from_run import list_unread, read_own_workloads, read_study
from lorameter.studies.study import Study
from tests.constructed import RUNS


def run_with(change, *, newer=True):
    """A constructed run whose study was changed, as a newer version wrote it."""
    run = store.read_run("sound", RUNS)
    manifest = dataclasses.replace(run.manifest, **change(dict(run.manifest.study)))
    return dataclasses.replace(
        run, manifest=manifest, newer=NewerSchema(schema=9, unread=("a line",)) if newer else None
    )


def test_of_a_run_that_is_known_every_key_must_be(tmp_path):
    """As ever: what is not known could be what two sides differ in."""
    run = store.read_run("sound", RUNS)
    assert read_study(run) == codec.from_json(Study, run.manifest.study, "it")
    assert list_unread(run) == ()
    with pytest.raises(UsageError, match="shade"):
        read_study(run_with(lambda study: {"study": study | {"shade": 1}}, newer=False))


def test_what_is_not_known_is_left_out_and_named():
    """Of the study, of what a profile replaced in it, and of a variant's own workload."""
    own = {"lora-r16": {"batch_size": 2, "ropes": 3}}
    run = run_with(
        lambda study: {"study": study | {"shade": 1, "replaced": {"workload.ropes": 2}}, "own_workloads": own}
    )
    study = read_study(run)
    assert study.variants == read_study(store.read_run("sound", RUNS)).variants
    assert study.replaced == {}
    assert read_own_workloads(run)["lora-r16"].batch_size == 2
    said = list_unread(run)
    assert said[0] == "a line"
    assert {one.rpartition(", ")[2] for one in said[1:]} == {"shade", "workload.ropes", "ropes"}


def test_claims_on_what_was_left_out_go_with_it():
    """A variant that this version does not know was a level of theirs; the numbers of the others are there."""

    def changed(study):
        odd = study["variants"][-1] | {"name": "odd", "quantization": "int3"}
        part = {"rule": "differs", "axis": "quantization", "levels": ["none", "int3"], "metric": "step_time_s"}
        claim = {"id": "1", "says": "int3 is another", "parts": [part]}
        return {"study": study | {"variants": [*study["variants"], odd], "claims": [claim]}}

    run = run_with(changed)
    assert "odd" not in [variant.name for variant in read_study(run).variants]
    assert read_study(run).claims == ()
    assert any("int3" in one and "claims" in one for one in list_unread(run))
    assert any("quantization = 'int3'" in one for one in list_unread(run))


def test_without_its_reference_a_study_is_none():
    """There is nothing that a ratio could be taken against, and nobody chooses another."""

    def changed(study):
        variants = [one | {"quantization": "int3"} for one in study["variants"] if one["name"] == study["reference"]]
        return {"study": study | {"variants": [*variants, study["variants"][1]], "claims": []}}

    with pytest.raises(UsageError, match="reference"):
        read_study(run_with(changed))

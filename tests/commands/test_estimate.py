"""`lorameter estimate` says what a variant takes without loading it, and what an earlier run found beside it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from harness.cli import main
from harness.errors import UsageError
from harness.machine import provenance
from harness.models import catalogue, shapes
from harness.models.costs.memory import birth_bytes, estimate_memory
from harness.records.metrics import BIRTH
from harness.run.contenders import Contender
from harness.run.feasibility import check_feasible
from harness.studies.study_file import load_study

SPEC = "lora-or-qlora:qlora-nf4-r16"


def test_json_is_one_document_with_both_phases(capsys, tmp_path):
    """Kinds add up to the total; without an earlier run nothing is measured."""
    assert main(["estimate", SPEC, "--model", "random:llama2-7b", "--json", "--runs-dir", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["variant"], told["model"]) == (2, "qlora-nf4-r16", "random:llama2-7b")
    for phase in ("train", "generate"):
        assert sum(told[phase]["kinds"].values()) == told[phase]["total_bytes"] > 3e9
        assert told[phase]["measured_bytes"] is told[phase]["error"] is None
    assert "kv_cache" in told["generate"]["kinds"]


def test_an_earlier_run_stands_beside_with_the_error(capsys, small_study, write_run, tmp_path, monkeypatch, machine):
    """The largest peak of that variant and workload on this machine."""
    monkeypatch.setattr(provenance, "probe_machine", lambda: machine)
    monkeypatch.setattr(
        "harness.studies.study_file.load_variant", lambda spec, **_: (small_study, small_study.variants[0])
    )
    write_run("earlier", {"plain": [1.0, 1.0]}, peak=10**9)
    assert main(["estimate", "small:plain", "--runs-dir", str(tmp_path / "runs"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["train"]
    assert told["measured_bytes"] == 10**9
    assert told["error"] == pytest.approx(told["total_bytes"] / 10**9 - 1)
    assert main(["estimate", "small:plain", "--runs-dir", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert "measured peak" in shown
    assert "953.7" in shown  # MiB
    assert f"{told['error']:+.1%}" in shown


def test_the_process_is_that_of_an_earlier_run_of_any_workload(capsys, write_run, tmp_path, monkeypatch, machine):
    """Not of the constant, where a trial has begun on this machine with these libraries."""
    monkeypatch.setattr(provenance, "probe_machine", lambda: machine)
    libraries = {name: provenance.library_version(name) for name in ("torch", "transformers")}
    write_run(
        "earlier", {"plain": [1.0]}, facts={"libraries": libraries},
        change=lambda record: dataclasses.replace(record, memory={BIRTH: 515 * 2**20}),
    )  # fmt: skip
    assert main(["estimate", SPEC, "--runs-dir", str(tmp_path / "runs"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["train"]["kinds"]["process"] == told["generate"]["kinds"]["process"] == 515 * 2**20


def test_what_fits_beside_one_build_of_torch_may_not_beside_another(machine):
    """A process begins with more where torch is built for CUDA, whether or not there is a card."""
    study = load_study("lora-or-qlora").with_overrides(model="random:tiny-llama")
    chosen = [Contender(variant=study.variants[0], workload=study.workload)]
    shape = shapes.shape(catalogue.resolve(study.workload.model))
    needed = estimate_memory(study.variants[0], study.workload, shape, process_bytes=birth_bytes("13.0")).needed_bytes
    small = dataclasses.replace(machine, memory_bytes=int(needed * 0.8))
    check_feasible(study, small, chosen)
    with pytest.raises(UsageError, match="needs about"):
        check_feasible(study, dataclasses.replace(small, cuda="13.0"), chosen)


def test_what_clearly_does_not_fit_is_refused_and_what_may_not_is_said(machine):
    """An out-of-memory costs the time until it comes; the estimate is there before, also of what others leave free."""
    study = load_study("lora-or-qlora").with_overrides(model="random:llama2-7b")
    variant = study.variants[0]
    shape = shapes.shape(catalogue.resolve(study.workload.model))
    needed = estimate_memory(variant, study.workload, shape).needed_bytes

    def notices(share, free=None):
        small = dataclasses.replace(machine, memory_bytes=int(needed * share))
        return [
            notice.code
            for notice in check_feasible(
                study, small, [Contender(variant=variant, workload=study.workload)], free_bytes=free
            )
        ]

    assert "memory-short" not in notices(1.2)
    assert "memory-short" in notices(1.0)
    with pytest.raises(UsageError, match=f"{variant.name}.*needs about .* this machine has"):
        notices(0.8)
    for share, taken in ((1.2, False), (1.0, True), (None, False)):
        assert ("memory-taken" in notices(2.0, share and int(needed * share))) is taken

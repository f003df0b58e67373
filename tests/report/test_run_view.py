"""Tests of the view of a run: verdicts, trials without a result, and notices."""

from __future__ import annotations

import dataclasses
import json

from lorameter.cli import main
from lorameter.records import codec
from lorameter.records.record import Failure, TrialRecord
from lorameter.records.store import Manifest, Run
from lorameter.report.run_view import view_of
from lorameter.studies.script_study import study_of_command


def run_of(study, tmp_path, *, steps, control=None, statuses=None):
    """Write a run of constructed records; `steps` gives the step times of each variant by replicate."""
    records = []
    members = [*((name, "variant") for name in steps), (study.reference, "control")]
    for name, role in members:
        times = control if role == "control" and control else steps[name]
        for replicate, step in enumerate(times):
            status = (statuses or {}).get((name, role, replicate), "ok")
            failure = Failure(phase="build", kind="X", message="it broke") if status != "ok" else None
            records.append(
                TrialRecord(
                    trial=f"r{replicate}-{name}{'-control' if role == 'control' else ''}", status=status, name=name,
                    variant=name, role=role, replicate=replicate, position=0, interleaving="replicates", seed=0,
                    started_unix_s=0.0, wall_time_s=1.0, failure=failure, log=f"logs/{name}.log",
                    samples={
                        "step_time_s": (step,) * 4, "step_cpu_time_s": (step,) * 4,
                        "timed_loss": (2.0,) * 4, "turn_tokens": (100.0,),
                    },
                    values={"held_out_loss": 3.0}, memory={"host_peak_train_bytes": 2**30},
                    checks=({"path": "base.bits", "required": 4, "observed": 4, "status": "active", "reason": ""},),
                )
            )  # fmt: skip
    manifest = Manifest(
        run="run", study=codec.to_json(study), phases=("train",), interleaving="replicates", order=(), seed=0,
        created_unix_s=0.0, fingerprint="f", status="complete",
        tokens={"synthetic": True, "hash": "abc", "data": "synthetic records"},
        provenance={
            "device_name": "Test CPU", "device": "cpu", "threads": 1, "python": "3.11",
            "git": {"commit": None, "dirty": None},
            "libraries": dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1"),
        },
    )  # fmt: skip
    return Run(path=tmp_path, manifest=manifest, records=tuple(records), damaged_lines=0)


QUIET = (0.100, 0.101, 0.099, 0.1005, 0.0995)


def test_an_inconclusive_control_forbids_equality(small_study, tmp_path):
    """Variants with equal times are not called equivalent when the A/A control is inconclusive."""
    noisy = (0.092, 0.108, 0.095, 0.106, 0.099)
    view = view_of(run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, control=noisy))
    assert view.tables[0].control.verdict == "inconclusive"
    assert view.tables[0].ratios["nf4"].verdict == "inconclusive"
    assert "control" in view.tables[0].ratios["nf4"].reason
    assert view.valid


def test_a_trial_without_a_result_is_named_and_not_ranked(small_study, tmp_path):
    """A trial without a result is listed with status, reason and log; the other trials give the estimate, and the run
    is invalid."""
    run = run_of(
        small_study, tmp_path, steps={"plain": QUIET, "nf4": (9.0, *QUIET[1:])}, control=QUIET,
        statuses={("nf4", "variant", 0): "oom"},
    )  # fmt: skip
    view = view_of(run)
    assert not view.valid
    assert view.validity.failures == ("r0-nf4: oom in build: it broke (log: logs/nf4.log)",)
    assert view.tables[0].ratios["nf4"].replicates == 4
    assert view.counts == {"ok": 14, "oom": 1}


def test_a_trial_that_gets_slower_is_named(small_study, tmp_path):
    """A change of level in the timed steps of a trial gives a notice; steady steps give none."""
    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET})
    assert "drift" not in {notice.code for notice in view_of(run).notices}
    steady = [0.1 + 0.0001 * (i % 3) for i in range(16)]
    slower = [*steady[:8], *(1.3 * step for step in steady[8:])]
    records = [record.replaced(samples={**record.samples, "step_time_s": tuple(steady)}) for record in run.records]
    records[0] = records[0].replaced(samples={**records[0].samples, "step_time_s": tuple(slower)})
    (drift,) = (n for n in view_of(dataclasses.replace(run, records=tuple(records))).notices if n.code == "drift")
    assert drift.message.startswith(f"1 of {len(records)} trials")
    assert records[0].trial in drift.message


def report_of(path, capsys, code=0):
    """Return the run as the command prints it and as its JSON document."""
    outputs = []
    for options in ([], ["--json"]):
        assert main(["report", str(path), *options]) == code
        outputs.append(capsys.readouterr().out)
    return outputs[0], json.loads(outputs[1])


def test_a_wrapped_run_is_valid_without_ratios_and_control(write_run, capsys):
    """A run of `lorameter wrap` has no column of ratios and no control, and is valid without them."""
    study = study_of_command("python train.py")
    text, data = report_of(write_run("followed", {"train": [0.1]}, study=study, control=None), capsys)
    (table,) = data["tables"]
    assert (table["alone"], table["control"], data["valid"]) == (True, None, True)
    assert not [head for head in table["heads"] if "×" in head]
    assert len(table["heads"]) == len(table["rows"][0]["cells"])
    assert "control" not in text
    assert "×" not in text
    assert "This run" not in text

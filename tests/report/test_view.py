"""The view of a run: what is shown, what is withheld, what is said."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from harness.cli import main
from harness.records import codec
from harness.records.record import Failure, Notice, TrialRecord
from harness.records.store import Manifest, Run
from harness.report.live import LiveDisplay
from harness.report.run import describe_run
from harness.report.terminal import console_for, show
from harness.report.view import view_of
from harness.stats import estimate_trials
from harness.studies.script_study import study_of_command


def run_of(study, tmp_path, *, steps, control=None, statuses=None, occupancy=1.0, damaged=0):
    """A run of constructed records: `steps` gives each variant's step time by replicate."""
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
                        "step_time_s": (step,) * 4, "step_cpu_time_s": (step * occupancy,) * 4,
                        "train_loss": (2.0,) * 4, "turn_real_tokens": (100.0,),
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
    return Run(path=tmp_path, manifest=manifest, records=tuple(records), damaged_lines=damaged)


def text_of(view, width=160):
    """The plain rendering."""
    buffer = io.StringIO()
    show(describe_run(view), Console(file=buffer, width=width))
    return buffer.getvalue()


QUIET = (0.100, 0.101, 0.099, 0.1005, 0.0995)


def test_every_variant_has_its_estimate_interval_and_ratio(small_study, tmp_path):
    """A clear slow-down is regressed, the control equivalent, and all of it is on the page."""
    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": tuple(2 * s for s in QUIET)}, control=QUIET)
    view = view_of(run)
    (table,) = view.tables
    assert [row.name for row in table.rows] == ["plain", "nf4"]
    assert table.control.verdict == "equivalent"
    assert table.rows[1].ratio.verdict == "regressed"
    assert view.valid
    text = text_of(view)
    for word in ("plain", "nf4", "reference", "slower", "control", "1 GiB", "all active", "equivalent ±5 %"):
        assert word in text
    assert "synthetic-data" in text


def test_host_peaks_are_said_to_include_the_process_at_birth(small_study, tmp_path):
    """A fork maps what its zygote imported; on a card whose own peaks are shown there is nothing to say."""

    def note(**memory):
        run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET})
        births = iter((336, 336, 340) * 10)
        records = tuple(
            record.replaced(memory=record.memory | {"host_baseline_bytes": next(births) * 2**20} | memory)
            for record in run.records
        )
        view = view_of(dataclasses.replace(run, records=records))
        assert view.tables[0].note in text_of(view)
        return view.tables[0].note

    assert note() == "host peaks include 336 MiB to 340 MiB with which each process begins"
    assert note(host_baseline_bytes=336 * 2**20) == "host peaks include 336 MiB with which each process begins"
    assert note(device_peak_allocated_train_bytes=2**30) == ""
    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET})
    assert view_of(run).tables[0].note == ""


def test_a_control_that_differs_makes_the_run_invalid(small_study, tmp_path):
    """Whatever the variants say."""
    slow = tuple(1.5 * s for s in QUIET)
    view = view_of(run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, control=slow))
    assert not view.valid
    assert "control-failed" in {notice.code for notice in view.notices}
    assert text_of(view).startswith("INVALID: its control regressed in phase 'train'")


def test_an_inconclusive_control_forbids_equality(small_study, tmp_path):
    """Two variants that look equal are not called so when the control cannot show what equal is."""
    noisy = (0.092, 0.108, 0.095, 0.106, 0.099)
    view = view_of(run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, control=noisy))
    assert view.tables[0].control.verdict == "inconclusive"
    assert view.tables[0].rows[1].ratio.verdict == "inconclusive"
    assert "control" in view.tables[0].rows[1].ratio.reason
    assert view.valid


def test_a_trial_without_a_result_is_named_and_not_ranked(small_study, tmp_path):
    """Status, reason and log are listed; the estimate rests on the others; the run is not valid."""
    run = run_of(
        small_study, tmp_path, steps={"plain": QUIET, "nf4": (9.0, *QUIET[1:])}, control=QUIET,
        statuses={("nf4", "variant", 0): "oom"},
    )  # fmt: skip
    view = view_of(run)
    assert not view.valid
    assert view.failures == ("r0-nf4: oom in build: it broke (log: logs/nf4.log)",)
    assert view.tables[0].rows[1].ratio.replicates == 4
    assert view.counts == {"ok": 14, "oom": 1}


def test_a_variant_without_any_result_is_still_a_row(small_study, tmp_path):
    """Dashes, not a crash."""
    statuses = {("nf4", "variant", i): "crashed" for i in range(5)}
    view = view_of(run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, statuses=statuses))
    assert view.tables[0].rows[1].cells[1].text == "–"


def test_one_replicate_has_no_interval_and_says_so(small_study, tmp_path):
    """A number never stands alone."""
    view = view_of(run_of(small_study, tmp_path, steps={"plain": (0.1,), "nf4": (0.2,)}))
    assert "100 ms\n[no interval]".split("\n")[1] in text_of(view)


def test_several_threads_are_no_contention(small_study, tmp_path):
    """They wait for each other, so what they leave idle says nothing of other work; one thread is counted as such."""
    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, occupancy=0.6)
    records = tuple(
        record.replaced(values=record.values | {"threads": 2.0 if record.name == "nf4" else 1.0})
        for record in run.records
    )
    (notice,) = (n for n in view_of(dataclasses.replace(run, records=records)).notices if n.code == "contention")
    assert notice.message.startswith("10 of 10 trials of one thread had less than 95% of a CPU")


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"power_limit_w": 500.0, "default_power_limit_w": 700.0}, "1 thread), power limit 500 W of 700 W"),
        ({"power_limit_w": 500.0, "default_power_limit_w": "not available: why"}, "1 thread), power limit 500 W"),
        ({"power_limit_w": "not available: why", "default_power_limit_w": 700.0}, "1 thread)"),
        (None, "1 thread)"),
    ],
)
def test_a_card_stands_with_its_power_limit(small_study, tmp_path, card, said):
    """In force and by default, as far as they are known; runs of before it was recorded have none."""
    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET})
    settings = {} if card is None else {"settings": {"card": card}}
    manifest = dataclasses.replace(run.manifest, provenance=run.manifest.provenance | settings)
    assert view_of(dataclasses.replace(run, manifest=manifest)).facts[0].text.endswith(said)


@pytest.mark.parametrize(("occupancy", "noticed"), [(0.6, True), (0.99, False)])
def test_contention_is_noticed_by_occupancy(small_study, tmp_path, occupancy, noticed):
    """CPU time over wall time, a flag that does not look at the outcome."""
    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, control=QUIET, occupancy=occupancy)
    assert ("contention" in {notice.code for notice in view_of(run).notices}) is noticed


@pytest.mark.parametrize(
    "change", [{"status": "running"}, {"status": "failed"}, {"order": ("r0-plain", "r9-gone")}], ids=str
)
def test_a_run_that_is_not_whole_is_no_pass(small_study, tmp_path, change):
    """The parent was killed, or trials of the plan have no record: not valid, and what is missing is named."""
    import dataclasses

    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, control=QUIET)
    assert view_of(run).valid
    view = view_of(dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, **change)))
    assert not view.valid
    assert ("r9-gone" in " ".join(view.failures)) is ("order" in change)


def test_a_run_without_a_control_is_no_pass(small_study, tmp_path):
    """Every control trial failed: nothing says what no difference looks like."""
    statuses = {("plain", "control", i): "crashed" for i in range(5)}
    view = view_of(run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, statuses=statuses))
    assert not view.valid
    assert view.tables[0].control is None


def test_damage_is_said_and_is_no_pass(small_study, tmp_path):
    """A line cut short counts as a trial not run."""
    view = view_of(run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, control=QUIET, damaged=1))
    assert not view.valid
    assert "damaged-lines" in {notice.code for notice in view.notices}


def test_piped_output_is_complete_and_plain(small_study, tmp_path):
    """No cut cell and no escape code without a terminal."""
    buffer = io.StringIO()
    view = view_of(run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}))
    show(describe_run(view), console_for(buffer))
    text = buffer.getvalue()
    assert "\x1b" not in text
    assert "…" not in text


def test_without_a_terminal_each_trial_is_a_line(small_study):
    """Progress that a log can hold: run, trial, status, reason."""
    from harness.run.plan import make_plan

    buffer = io.StringIO()
    plan = make_plan(small_study)
    with LiveDisplay(Console(file=buffer, width=200)) as display:
        display.starting(plan, "run-1")
        display.trial_phase(plan.slots[0], "build")
        display.trial_ended(
            TrialRecord(
                trial="r0-x", status="oom", name="x", variant="x", role="variant", replicate=0, position=0,
                interleaving="replicates", seed=0, started_unix_s=0.0, wall_time_s=1.5,
                failure=Failure(phase="build", kind="MemoryError", message="no memory left"),
            )
        )  # fmt: skip
    assert buffer.getvalue().splitlines() == [
        "run run-1: 6 trials, 2 replicates; starting the worker",
        "[1/6] r0-x oom in 1.5 s: no memory left",
    ]


def test_on_a_terminal_the_trial_under_way_is_shown(small_study):
    """Replicate, variant, phase and the time left; redrawn when told and by no thread."""
    import threading

    from harness.run.plan import make_plan

    buffer = io.StringIO()
    plan = make_plan(small_study)
    console = Console(file=buffer, width=120, force_terminal=True)
    threads = threading.active_count()
    with LiveDisplay(console) as display:
        display.starting(plan, "run-1")
        display.trial_phase(plan.slots[0], "turn")
        assert threading.active_count() == threads
    assert f"replicate 1/2  {plan.slots[0].variant.name}" in buffer.getvalue()
    assert "timing steps" in buffer.getvalue()


def test_a_notice_from_a_trial_is_shown_once(small_study, tmp_path):
    """Five trials with the same notice make one line."""
    import dataclasses

    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, control=QUIET)
    notice = Notice(code="fallback-allowed", message="m", remedy="r")
    records = tuple(dataclasses.replace(record, notices=(notice,)) for record in run.records)
    assert [n.code for n in view_of(dataclasses.replace(run, records=records)).notices].count("fallback-allowed") == 1


def test_on_a_gpu_waiting_is_no_contention(small_study, tmp_path):
    """The host of a GPU may rightly wait for it, also in trials that have no memory of their own."""
    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, occupancy=0.2)
    assert "contention" in {notice.code for notice in view_of(run).notices}
    provenance = {**run.manifest.provenance, "device": "cuda"}
    on_gpu = dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, provenance=provenance))
    assert "contention" not in {notice.code for notice in view_of(on_gpu).notices}


def test_a_trial_that_gets_slower_is_named(small_study, tmp_path):
    """A change of level in the timed steps is a notice; steady ones are none."""
    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET})
    assert "drift" not in {notice.code for notice in view_of(run).notices}
    steady = [0.1 + 0.0001 * (i % 3) for i in range(16)]
    slower = [*steady[:8], *(1.3 * step for step in steady[8:])]
    records = [record.replaced(samples={**record.samples, "step_time_s": tuple(steady)}) for record in run.records]
    records[0] = records[0].replaced(samples={**records[0].samples, "step_time_s": tuple(slower)})
    (drift,) = (n for n in view_of(dataclasses.replace(run, records=tuple(records))).notices if n.code == "drift")
    assert drift.message.startswith(f"1 of {len(records)} trials")
    assert records[0].trial in drift.message


def test_the_level_and_its_reason_are_on_the_page(small_study, tmp_path):
    """With what was measured outside it, and why the run ended early."""
    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET})
    manifest = dataclasses.replace(
        run.manifest, interleaving="lockstep", why="they fit together", stopped="precise after 5 replicates"
    )
    text = text_of(view_of(dataclasses.replace(run, manifest=manifest)))
    assert "lockstep: they fit together; peaks, cold starts and what needs its own base: solo trials" in text
    assert "stopped   precise after 5 replicates" in text


def test_a_step_that_was_watched_is_not_called_unchecked(small_study, tmp_path):
    """Nothing may have been required of it; of one that nobody watched there is nothing."""
    run = run_of(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, control=QUIET)
    for checks, said in (
        (
            ({"path": "base.bits", "required": None, "observed": 4, "status": "active", "reason": ""},),
            "nothing required",
        ),
        ((), "not checked"),
    ):
        seen = dataclasses.replace(run, records=tuple(record.replaced(checks=checks) for record in run.records))
        assert said in text_of(view_of(seen), width=300)


def report_of(path, capsys, code=0):
    """A run as the command shows it, and as the data that it gives to programs."""
    told = []
    for options in ([], ["--json"]):
        assert main(["report", str(path), *options]) == code
        told.append(capsys.readouterr().out)
    return told[0], json.loads(told[1])


def test_a_training_that_was_followed_has_nothing_to_be_compared_with(write_run, capsys):
    """No column of ratios, no word of a control; and it is valid without one."""
    study = study_of_command("python train.py")
    text, data = report_of(write_run("followed", {"train": [0.1]}, study=study, control=None), capsys)
    (table,) = data["tables"]
    assert (table["alone"], table["control"], data["valid"]) == (True, None, True)
    assert not [head for head in table["heads"] if "×" in head]
    assert len(table["heads"]) == len(table["rows"][0]["cells"])
    assert "control" not in text
    assert "×" not in text
    assert "This run" not in text


def test_a_study_with_a_reference_has_its_ratios_and_its_control(write_run, capsys):
    """Also one of scripts, and also where it measured one of them alone."""
    study = study_of_command("python train.py")
    for name, options in (("plain", {}), ("train", {"study": study})):
        text, data = report_of(write_run("compared", {name: [0.1] * 3}, **options), capsys)
        (table,) = data["tables"]
        assert table["heads"][2] == f"× {name}"
        assert "alone" not in table
        assert "control (the reference measured twice)" in text
    text, data = report_of(write_run("lacking", {"train": [0.1] * 3}, study=study, control=None), capsys, 4)
    assert "control: not measured" in text
    assert not data["valid"]


def test_a_followed_training_that_broke_off_is_not_gone_on_with(write_run, capsys):
    """How it stands is said; how to go on would be refused."""
    study = study_of_command("python train.py")
    path = write_run("broken", {"train": [0.1]}, study=study, control=None, status="interrupted")
    text, _ = report_of(path, capsys, 4)
    assert "stopped by the user; 1 of 1 trials have come to their end" in text
    assert "resume" not in text
    assert main(["run", "--resume", "broken", "--runs-dir", str(path.parent)]) == 2
    said = capsys.readouterr().err
    assert "run broken: it is of a training that was followed while it ran, which cannot be gone on with" in said


def test_a_range_of_peaks_is_not_called_an_interval(small_study, tmp_path):
    """The brackets beside a peak are the least and the largest that was seen."""
    text = text_of(view_of(run_of(small_study, tmp_path, steps={"plain": [1.0] * 5, "nf4": [2.0] * 5})), width=400)
    assert "peak memory" in text
    assert "memory: the largest of the trials, with the least and the largest" in text


def test_scaling_efficiency_has_its_interval_over_replicates(write_run, capsys):
    """Of several ranks: that of any metric, from one efficiency a replicate."""
    alone, together = (0.19, 0.18, 0.185), (0.1, 0.101, 0.099)

    def of_two_ranks(record):
        times = (alone[record.replicate],) * 3
        return record.replaced(
            samples={**record.samples, "one_rank_step_time_s": times}, values={**record.values, "ranks": 2.0}
        )

    text, data = report_of(write_run("ranks", {"plain": together}, change=of_two_ranks), capsys)
    (table,) = data["tables"]
    assert "scaling efficiency" in table["heads"]
    told = table["rows"][0]["values"]["scaling_efficiency"]
    expected = estimate_trials([[one / (2 * step)] for one, step in zip(alone, together, strict=True)])
    assert (told["value"], told["low"], told["high"]) == pytest.approx((expected.value, expected.low, expected.high))
    assert told["low"] < told["value"] < told["high"]
    assert "scaling efficiency" in text

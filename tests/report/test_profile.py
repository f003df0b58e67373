"""Tests of the report of a constructed profile: its accounts add up, and terminal and file have all of it.

Tests of `lorameter sample`: the decoded answers of a run, next to the record's own text.

Tests of the report of whether a variant fits: first the finding with its range, then the basis and what to
change.
"""

from __future__ import annotations

import dataclasses
import io
import json

import msgspec
import pytest

from lorameter import cli
from lorameter.cli import main
from lorameter.commands import profile as commands_profile
from lorameter.models.costs.flops import PREFIX, StepProducts
from lorameter.models.costs.peaks import Peak
from lorameter.profile.accounting import (
    IDLE,
    categories_s,
    compute_ceilings,
    plain_s,
    step_account,
    token_shares,
    unprofiled_time,
)
from lorameter.profile.facts import Profile
from lorameter.profile.remedy import RemedyResult
from lorameter.profile.rules import Finding
from lorameter.records import store
from lorameter.records.activity import Activity, OperatorUse, PhaseActivity
from lorameter.records.record import MemoryAccount, Notice, TrialRecord
from lorameter.report.parity import read_samples
from lorameter.report.profile import describe_profile, describe_remedy
from lorameter.report.terminal import console_for, render_text, show
from lorameter.stats import Estimate, compare_trials
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload

TIMES = {"data": 0.001, "forward": 0.030, "backward": 0.060, "update": 0.008}


def use(name, category, time_s):
    return OperatorUse(name=name, category=category, calls=2.0, time_s=time_s)


def phase(name, window_s, *uses, totals=None):
    busy = sum(one.time_s for one in uses)
    return PhaseActivity(phase=name, window_s=window_s, busy_s=busy, operators=uses, totals_s=totals or {})


ACTIVITY = Activity(
    device="cpu",
    step_times_s=(0.2, 0.2, 0.2),
    phases=(
        phase("data", 0.002),
        phase(
            "forward",
            0.060,
            use("aten::mm", "matmul", 0.03),
            use("aten::bernoulli_", "elementwise", 0.02),
            totals={"aten::dropout": 0.025},
        ),
        phase("backward", 0.120, use("aten::mm", "matmul", 0.12)),
        phase("update", 0.016, use("aten::_fused_adamw_", "optimizer", 0.008)),
    ),
)
"""Constructed times under the profiler, which doubles them."""
SAMPLES = {
    "plain_step_time_s": (0.1,) * 8,
    "plain_step_cpu_time_s": (0.099,) * 8,
    "bordered_step_time_s": (0.1001,) * 8,
    "bordered_step_cpu_time_s": (0.1,) * 8,
    "between_steps_s": (2e-5,) * 7,
} | {f"phase_{name}_s": (seconds,) * 8 for name, seconds in TIMES.items()}


@pytest.fixture
def profile():
    workload = Workload(batch_size=2, layout="padded")
    peak = {"device": "this CPU with 1 thread", "source": "constructed"}
    record = TrialRecord(
        trial="r0-v", status="ok", name="v", variant="v", role="variant", replicate=0, position=0,
        interleaving="replicates", seed=0, started_unix_s=0.0, wall_time_s=1.0, samples=SAMPLES,
        values={"useful_positions": 192.0, "useful_pairs": 9312.0, "trainable_parameters": 1e5},
        memory={"host_peak_train_bytes": 2**30, "optimizer_state_bytes": 800000, "paged_optimizer_state_bytes": 0},
        checks=({"path": "checkpointing", "observed": True, "required": None},),
    )  # fmt: skip
    return Profile(
        study="s", variant=LoraVariant(name="v", lora_dropout=0.1, gradient_checkpointing=True), workload=workload,
        device="cpu", device_name="a CPU", threads=1, cpus=2, wide_registers=True, memory_bytes=8 * 2**30,
        record=record, activity=ACTIVITY,
        memory=MemoryAccount(phase="train", kinds={"process": 2**28, "gradients": 2**29}, peak_bytes=2**30),
        peaks={
            "product": Peak(rate="bfloat16", per_s=1e12, **peak), "memory": Peak(rate="memory", per_s=1e10, **peak)
        },
    )  # fmt: skip


def test_the_lines_of_a_step_add_up(profile):
    """Phases and remainder add up to the step, categories and idle time to the phases; the profiler's slow-down is
    reported."""
    step = step_account(profile)
    assert (step.remainder.value, step.remainder.low, step.remainder.high) == pytest.approx((0.001,) * 3)
    assert step.explained
    assert step.borders.value == pytest.approx(0.0001)
    assert step.covered.value == pytest.approx(0.099 / 0.1001)
    assert step.profiler_slowdown.value == pytest.approx(2.0)
    assert step.occupancy == pytest.approx(0.99)
    found = categories_s(profile, step)
    assert list(found)[-1] == IDLE
    assert found["matmul"] == {"data": 0.0, "forward": 0.015, "backward": 0.06, "update": 0.0}
    assert sum(sum(each.values()) for each in found.values()) == pytest.approx(sum(TIMES.values()))
    assert unprofiled_time(profile, step, lambda one: one.totals_s.get("aten::dropout", 0.0)) == pytest.approx(0.0125)
    counted = msgspec.structs.replace(ACTIVITY.phases[1], records={"phase": 100.0})
    assert plain_s(profile, step, counted, 0.025) == pytest.approx(0.0125)
    for records, seconds in ((0.0, 0.025), (10.0, 0.022), (100.0, 0.0)):  # 100 records cost 30 ms
        assert plain_s(profile, step, counted, 0.025, records=records) == pytest.approx(seconds)
    samples = {name: (*values, 10 * values[0]) for name, values in SAMPLES.items()}
    samples["plain_step_cpu_time_s"] = SAMPLES["plain_step_cpu_time_s"] + (0.5,)
    disturbed = step_account(dataclasses.replace(profile, record=profile.record.replaced(samples=samples)))
    assert (disturbed.pairs, disturbed.counted, disturbed.step) == (9, 8, step.step)


@pytest.mark.parametrize(("per_s", "shown"), [(1e12, "MFU "), (1e3, "that is no peak, so there is no MFU")])
def test_a_peak_that_the_step_exceeds_is_no_peak(profile, per_s, shown):
    """A measured peak below what the step reaches gives one sentence, and no share of it."""
    values = profile.record.values | {f"{PREFIX}{name}": 1000.0 for name in StepProducts.__slots__}
    peak = dataclasses.replace(profile.peaks["product"], per_s=per_s)
    slow = dataclasses.replace(
        profile, record=profile.record.replaced(values=values), peaks=profile.peaks | {"product": peak}
    )
    step = step_account(slow)
    document = describe_profile(slow, step, token_shares(slow), compute_ceilings(slow, step.step), ())
    text = " ".join(render_text(document, width=400, coloured=False).split())
    assert shown in text
    assert "MFU 1" not in text


@pytest.mark.parametrize(
    ("remainder", "explained"),
    [
        (Estimate(value=0.001, low=-0.001, high=0.0019), True),
        (Estimate(value=0.001, low=-0.001, high=0.003), None),
        (Estimate(value=0.003, low=0.0021, high=0.004), False),
        (Estimate(value=-0.003, low=-0.004, high=-0.0021), False),
        (Estimate(value=0.0019, low=None, high=None), True),
    ],
)
def test_a_step_is_explained_where_the_whole_interval_is_within_the_limit(profile, remainder, explained):
    """The limit is 2 % of the step; an interval across the limit is inconclusive."""
    step = dataclasses.replace(step_account(profile), remainder=remainder)
    assert step.explained is explained
    text = io.StringIO()
    show(describe_profile(profile, step, token_shares(profile), "x", ()), console_for(text))
    assert ("is inconclusive" in text.getvalue()) is (explained is None)
    assert ("do not explain" in text.getvalue()) is (explained is False)


def outcome(ratio=0.8, *, scatter=0.001, valid=True, metric="step_time_s", **changes):
    """Return a constructed result of a remedy: four replicates with about this ratio."""
    base = [(1.0 + 0.01 * replicate,) * 6 for replicate in range(4)]
    candidate = [(time[0] * ratio * (1 + scatter * (-1) ** replicate),) * 6 for replicate, time in enumerate(base)]
    comparison = compare_trials(base, candidate, pairing="turn")
    finding = Finding(
        code="x", message="m", cost_s=0.02, cost_share=0.25, remedy="r",
        **changes or {"changes": {"lora_dropout": 0.0}},
    )  # fmt: skip
    notice = Notice(code="cpu-contention", message="others ran.", remedy="Stop them.")
    return RemedyResult(
        finding=finding, run="run", interleaving="lockstep", metric=metric, comparison=comparison, control=comparison,
        failures=(), notices=(notice,), valid=valid,
    )  # fmt: skip


def shown(tried):
    text = io.StringIO()
    show(describe_remedy(tried), console_for(text))
    return text.getvalue()


def test_a_gain_is_shown_with_its_interval_and_the_notices():
    """The gain is of a step, or of the time per real token where the workload changed; the run's notices follow."""
    text = shown(outcome())
    assert "x by lora_dropout = 0.0 (lockstep)" in text
    assert "gained 20.00 [19.85, 20.15] % of a step; the profile attributed 25.0% of a step to it" in text
    assert "contention  others ran. Stop them." in text
    text = shown(outcome(metric="time_per_real_token_s", workload_changes={"layout": "packed"}))
    assert "x by layout = packed" in text
    assert "time per real token with the remedy over without: 0.8000 [0.7985, 0.8015] faster" in text
    assert "% of the time per real token; the profile" in text


@pytest.mark.parametrize(
    ("tried", "code"),
    [
        (outcome(), 0),
        (outcome(1.0), 0),
        (outcome(1.0, scatter=0.2), 3),
        (outcome(valid=False), 4),
    ],
)
def test_the_exit_code_shows_whether_the_remedy_has_a_verdict(profile, monkeypatch, capsys, tmp_path, tried, code):
    """The code is 0 for any verdict, also a loss, 3 if inconclusive and 4 if invalid."""
    monkeypatch.setattr(commands_profile, "profile_variant", lambda *args, **options: (profile, tmp_path))
    monkeypatch.setattr(commands_profile, "_try", lambda *args: tried)
    assert cli.main(["profile", "lora-or-qlora:lora-r16", "--try", "dropout", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["tried"]["comparison"]["verdict"] == tried.comparison.verdict
    assert document["tried"]["notices"][0]["code"] == "cpu-contention"


def test_an_untestable_remedy_still_prints_the_profile(profile, monkeypatch, capsys, tmp_path):
    """The document is still printed, the error is on stderr, and the exit code is that of bad input."""
    kinds = profile.memory.kinds | {"logits": 2**28}
    seen = dataclasses.replace(profile, memory=msgspec.structs.replace(profile.memory, kinds=kinds))
    monkeypatch.setattr(commands_profile, "profile_variant", lambda *args, **options: (seen, tmp_path))
    for code in ("logits", "dequantisation"):
        assert cli.main(["profile", "lora-or-qlora:lora-r16", "--try", code, "--json"]) == 2
        printed = capsys.readouterr()
        document = json.loads(printed.out)
        assert document["tried"] is None
        assert "logits" in {finding["code"] for finding in document["findings"]}
        assert f"--try {code}: no such finding here has a remedy" in printed.err
    assert cli.main(["profile", "lora-or-qlora:lora-r16", "--try", "logits"]) == 2
    text = capsys.readouterr().out
    for word in ("Cannot", "tried", "here:", "chunked"):  # the column wraps between words
        assert word in text
    assert "--try logits" not in text
    assert "--try padding" in text


EXAMPLES = [{"prompt": "Input: 4\n", "reference": "What is 2 + 2?"}, {"prompt": "Input: sky\n", "reference": "Blue?"}]
END = 257


@pytest.fixture
def run(write_run, small_study, tmp_path):
    """A run of tiny-llama (a token is a byte) in which `plain` has one complete and one truncated answer."""
    workload = dataclasses.replace(small_study.workload, open_ended_tokens=5)

    def answered(record):
        answers = {"answer_0": [*b"Two?", END], "answer_1": [*b"Colou"], "base_answer_0": [*b"0"]}
        plain = record.name == "plain" and record.role == "variant"
        return record.replaced(tokens=answers) if plain else record

    study = dataclasses.replace(small_study, workload=workload)
    path = write_run("a", {"plain": [1.0, 1.0], "nf4": [1.0, 1.0]}, study=study, change=answered)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["tokens"] = {"examples": EXAMPLES}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return store.read_run(str(path), tmp_path / "runs")


def test_answers_are_shown_with_prompt_and_reference(run):
    """Answers are in the order of the prompts and marked as complete or not; an answer that was not generated before
    training is None."""
    first, second = read_samples(run, "plain", replicate=1)
    assert (first.prompt, first.reference, first.base_answer, first.trained) == (
        "Input: 4\n",
        "What is 2 + 2?",
        "0",
        "Two?",
    )
    assert (first.tokens, first.ended) == (5, True)
    assert (second.base_answer, second.trained, second.ended) == (None, "Colou", False)
    assert read_samples(run, "plain", count=1) == (first,)


@pytest.mark.parametrize("variant", ["plain", "nf4"])
def test_a_run_without_answers_is_refused_with_the_remedy(write_run, capsys, variant):
    """The error has the study key that keeps answers and the command, and does not list variants as "none"."""
    path = write_run("bare", {"plain": [1.0, 1.0], "nf4": [1.0, 1.0]})
    assert main(["sample", str(path), variant]) == 2
    said = capsys.readouterr().err
    assert "run bare has no answers" in said
    assert (
        "Write open_ended_tokens = 64 in [workload] of the study and measure it again with the phase generate" in said
    )
    assert "none" not in said


@pytest.fixture(scope="module")
def said(every_report):
    """The documents about the fit, each as one line of text."""
    return {
        name: " ".join(render_text(document, width=5000, coloured=False).split())
        for name, document in every_report.items()
        if name.startswith(("fit", "no fit"))
    }


@pytest.mark.parametrize(("name", "finding"), [
    ("fit", "On H200 141GB fits: needs"), ("no fit", "On RTX 5090 32GB does not fit: needs"),
    ("no fit on 1 GiB", "On 1GiB does not fit: needs"), ("fit on this machine", "On Test [CPU] fits: needs"),
])  # fmt: skip
def test_the_finding_comes_first_with_its_range(said, name, finding):
    """The finding also has the spare or missing memory at the end of the range that decides."""
    assert said[name].startswith(finding)
    assert ("or more are left" in said[name]) is ("does not" not in finding)
    assert ("or more are missing" in said[name]) is ("does not" in finding)

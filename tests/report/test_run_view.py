"""Tests of the view of a run: verdicts, trials without a result, and notices.

Tests that a run in any state has a report: failures, missing metrics, one replicate, no reference, truncated lines.

Tests of the matrix of checks on the page: the colour of each status, and the status shown for several trials.

Tests that the report of an invalid run begins with the reason and shows no valid verdict, in every format.

Tests of the report of a run whose time limit skipped a part.

Tests of the report of a constructed request profile: its lines add up, and terminal, document and file have all of
it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser

import msgspec
import pytest

import lorameter
from lorameter import cli
from lorameter.cli import main
from lorameter.commands import profile as commands_profile
from lorameter.errors import EXIT_INVALID, EXIT_PASS
from lorameter.profile.accounting import request_accounts
from lorameter.profile.evidence import gather_request_evidence
from lorameter.profile.rules import diagnose_requests
from lorameter.records import codec
from lorameter.records.record import Failure, TrialRecord
from lorameter.records.store import Manifest, Run
from lorameter.report.run_view import make_run_view
from lorameter.studies.commands import study_of_command
from lorameter.studies.study import Target
from lorameter.studies.study_file import load_study
from tests.constructed import RUNS


def make_run(study, tmp_path, *, steps, control=None, statuses=None):
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
    view = make_run_view(make_run(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET}, control=noisy))
    assert view.tables[0].control.verdict == "inconclusive"
    assert view.tables[0].ratios["nf4"].verdict == "inconclusive"
    assert "control" in view.tables[0].ratios["nf4"].reason
    assert view.valid


def test_a_trial_without_a_result_is_named_and_not_ranked(small_study, tmp_path):
    """A trial without a result is listed with status, reason and log; the other trials give the estimate, and the run
    is invalid."""
    run = make_run(
        small_study, tmp_path, steps={"plain": QUIET, "nf4": (9.0, *QUIET[1:])}, control=QUIET,
        statuses={("nf4", "variant", 0): "oom"},
    )  # fmt: skip
    view = make_run_view(run)
    assert not view.valid
    assert view.validity.failures == ("r0-nf4: oom in build: it broke (log: logs/nf4.log)",)
    assert view.tables[0].ratios["nf4"].replicates == 4
    assert view.counts == {"ok": 14, "oom": 1}


def test_a_trial_that_gets_slower_is_named(small_study, tmp_path):
    """A change of level in the timed steps of a trial gives a notice; steady steps give none."""
    run = make_run(small_study, tmp_path, steps={"plain": QUIET, "nf4": QUIET})
    assert "drift" not in {notice.code for notice in make_run_view(run).notices}
    steady = [0.1 + 0.0001 * (i % 3) for i in range(16)]
    slower = [*steady[:8], *(1.3 * step for step in steady[8:])]
    records = [record.replaced(samples={**record.samples, "step_time_s": tuple(steady)}) for record in run.records]
    records[0] = records[0].replaced(samples={**records[0].samples, "step_time_s": tuple(slower)})
    (drift,) = (n for n in make_run_view(dataclasses.replace(run, records=tuple(records))).notices if n.code == "drift")
    assert drift.message.startswith(f"1 of {len(records)} trials")
    assert records[0].trial in drift.message


def report_run(path, capsys, code=0):
    """Return the run as the command prints it and as its JSON document."""
    outputs = []
    for options in ([], ["--json"]):
        assert main(["report", str(path), *options]) == code
        outputs.append(capsys.readouterr().out)
    return outputs[0], json.loads(outputs[1])


def test_a_wrapped_run_is_valid_without_ratios_and_control(write_run, capsys):
    """A run of `lorameter wrap` has no column of ratios and no control, and is valid without them."""
    study = study_of_command("python train.py")
    text, data = report_run(write_run("followed", {"train": [0.1]}, study=study, control=None), capsys)
    (table,) = data["tables"]
    assert (table["alone"], table["control"], data["valid"]) == (True, None, True)
    assert not [head for head in table["heads"] if "×" in head]
    assert len(table["heads"]) == len(table["rows"][0]["cells"])
    assert "control" not in text
    assert "×" not in text
    assert "This run" not in text


UNUSUAL_RUNS = (
    "failed one-replicate without-reference killed given-up noisy fewer-variants fallback cold resumed ab-failed "
    "swept-in-part"
).split()


@pytest.mark.parametrize("run", UNUSUAL_RUNS)
def test_a_run_in_any_state_is_reported(run, capsys):
    """Each format reports the whole run; the exit code gives its state, and standard error stays empty."""
    for options in (["--markdown", "--verbose"], ["--json"]):
        code = main(["report", run, "--runs-dir", str(RUNS), *options])
        out, err = capsys.readouterr()
        assert code in (0, 1, 3, 4, 5)
        assert out.strip()
        assert not err
    assert json.loads(out)["schema"] == 2


def test_a_truncated_line_loses_its_trial_and_is_reported(tmp_path, capsys):
    """When the process was killed during a write, every format reports the complete records and names the damage."""
    path = tmp_path / "cut"
    shutil.copytree(RUNS / "sound", path)
    lines = (path / "trials.jsonl").read_text().splitlines(keepends=True)
    (path / "trials.jsonl").write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    for options in ([], ["--markdown"], ["--json"]):
        assert main(["report", str(path), *options]) == 4
        assert "damaged-lines" in capsys.readouterr().out


TONES = {"fallback": "bad", "absent": "bad", "unknown": "warning", "active": "good", "not_applicable": "warning"}


@pytest.fixture
def matrix(write_run, tmp_path, capsys):
    """A function that writes a run whose `nf4` trials have these statuses, and returns class and text of its cell."""

    def shown(*statuses, required=4):
        def checked(record):
            if record.name != "nf4":
                return record
            status = statuses[record.replicate % len(statuses)]
            check = {"path": "base.bits", "required": required, "observed": 16, "status": status, "reason": "seen"}
            return record.replaced(checks=(check,))

        page = tmp_path / "page.html"
        path = write_run("checked", {"plain": [1.0, 1.1, 1.2], "nf4": [1.0, 1.1, 1.2]}, change=checked)
        assert main(["report", str(path), "--html", str(page)]) in (EXIT_PASS, EXIT_INVALID)
        capsys.readouterr()
        cell = r'<td (?:data-variant="nf4" data-head="nf4"|colspan="2" data-head="all")>'
        found = re.findall(cell + r'<details><summary class="(\w+)">(\w+)', page.read_text("utf-8"))
        return found[0]

    return shown


@pytest.mark.parametrize(
    ("statuses", "worst"),
    [
        (("active", "unknown", "fallback"), "fallback"),
        (("active", "active", "unknown"), "unknown"),
        (("not_applicable", "active", "active"), "not_applicable"),
    ],
)
def test_the_worst_status_of_the_trials_is_shown(matrix, statuses, worst):
    """A fallback in one trial is shown although the path is unknown in another."""
    assert matrix(*statuses) == (TONES[worst], worst)


VERDICT_WORDS = re.compile(r"slower|faster|equivalent|inconclusive|regressed|improved|cannot tell", re.IGNORECASE)
INVALID = {
    "control-failed": "its control regressed in phase 'train': the reference differs from itself",
    "failed": "trial r0-qlora-nf4-r64-a256-isolated: oom in build: tried to allocate 2.00 GiB",
    "killed": "its status is 'running', not 'complete'",
    "swept-in-part": "3 planned trials without a record, r0-r=32 among them",
}


class Body(HTMLParser):
    """The texts between the tags of a page's body, in order."""

    def __init__(self, text):
        super().__init__()
        self.words = []
        self.feed(text.partition("<body>")[2])

    def handle_data(self, data):
        self.words += [data.strip()] if data.strip() else []


@pytest.fixture
def read_formats(tmp_path, capsys):
    """A function that reports a run in each format and returns the lines of each and the texts of the page."""

    def read(run, *options):
        page = tmp_path / "page.html"
        words = ["report", str(run), "--runs-dir", str(RUNS), *options]
        found = {}
        for form in ("text", "markdown", "github"):
            main([*words, "--format", form, "--html", str(page)])
            found[form] = capsys.readouterr().out.splitlines()
        text = page.read_text("utf-8")
        found["page"] = Body(text).words
        found["verdicts"] = re.findall(r'<span class="verdict [^"]*">(.*?)</span>', text)
        found["title"] = [unescape(re.search("<title>(.*?)</title>", text)[1])]
        found["headline"] = unescape(re.search("<h1>(.*?)</h1>", text)[1])
        found["summary"] = text.partition('<div class="summary">')[2].partition("</div>")[0]
        return found

    return read


def without_escapes(line):
    """Return a line without the escapes of Markdown and of a workflow command."""
    return re.sub(r"\\(.)", r"\1", line).replace("%2C", ",").replace("%3A", ":")


@pytest.mark.parametrize("run", INVALID)
def test_the_report_of_an_invalid_run_begins_with_the_reason(run, read_formats, capsys):
    """Each format begins with the reason and a remedy, and states them once; its page has a short title and a
    summary of verdicts, and each verdict in headline, tables, figures and --json is `invalid`."""
    found = read_formats(run)
    assert found["title"] == ["INVALID – " + found["headline"]]
    for form in ("text", "markdown", "page"):
        whole = without_escapes(" ".join(found[form]))
        assert whole.count(INVALID[run]) == 1, form
        assert re.search(r"INVALID: .*? (Stop|Read|See|Restore|Measure) ", whole), form
    assert found["summary"].count("<p>") > 2
    for form in ("text", "markdown", "github", "page"):
        first = without_escapes(found[form][0])
        assert "INVALID: " in first, form
        assert INVALID[run] in first, form
    main(["report", run, "--runs-dir", str(RUNS), "--json"])
    document = json.loads(capsys.readouterr().out)
    ratios = [row["ratio"] for table in document["tables"] for row in table["rows"] if row["ratio"]]
    assert {ratio["verdict"] for ratio in ratios} <= {"invalid"}
    assert all(ratio["reason"].startswith("the run is invalid: ") for ratio in ratios)
    names = {row["name"] for table in document["tables"] for row in table["rows"]}
    for form in ("text", "markdown"):
        for line in found[form]:
            named = re.match(r"\W*(training|generation|cold start|\S+) ", line)
            if named and without_escapes(named[1]) in {"training", "generation", "cold start", *names}:
                assert not VERDICT_WORDS.search(line), (form, line)
    assert set(found["verdicts"]) <= {"invalid"}
    assert bool(found["verdicts"]) == bool(ratios)


def test_a_required_path_that_was_not_active_makes_the_run_invalid(write_run, read_formats):
    """The run is invalid although the status of the trial itself is ok."""

    def fell_back(record):
        check = {"path": "base.bits", "required": 4, "observed": 16, "status": "fallback", "reason": "seen"}
        return record.replaced(checks=(check,)) if record.trial == "r1-nf4" else record

    path = write_run("fell", {"plain": [1.0, 1.1, 1.2], "nf4": [2.0, 2.2, 2.4]}, change=fell_back)
    line = read_formats(path)["text"][0]
    assert line.startswith("INVALID: trial r1-nf4: required path base.bits is fallback, not active. Read the evidence")
    assert set(lorameter.load(path).comparisons["verdict"]) == {"invalid"}


def test_title_and_steps_are_those_of_the_measurement(write_run, read_formats):
    """A study whose profile replaces the model is titled with the measured one, and the plan has the steps trained."""
    written = load_study("llama2-lora-parameters", target=Target(kind="cpu", dtype="bfloat16", why="a test"))
    assert not any("steps" in note or "SmolLM2" in note for note in written.notes)
    study = dataclasses.replace(written, claims=())
    path = write_run(
        "swept", {study.reference: [1.0, 1.1, 1.2], "r=16": [1.0, 1.1, 1.2]}, study=study,
        change=lambda record: record.replaced(values={"training_steps": 6.0}),
    )  # fmt: skip
    lines = read_formats(path)["text"]
    assert lines[0] == "LoRA parameters: alpha, dropout and rank, one at a time, on smollm2-135m"
    assert any(line.startswith("  plan") and "3 timed steps of 6 trained a trial" in line for line in lines)


STEPS = {"plain": [1.0, 1.1, 1.2], "nf4": [2.0, 2.2, 2.4]}


@pytest.fixture
def report_limited_run(write_run, small_study, capsys):
    """A function that writes a run without requests and with a limit of three minutes, and returns exit code and text
    of its report."""
    protocol = dataclasses.replace(small_study.protocol, max_minutes=3.0)
    study = dataclasses.replace(small_study, protocol=protocol)

    def without_requests(record):
        kept = {name: samples for name, samples in record.samples.items() if name != "request_time_s"}
        return record.replaced(samples=kept)

    def read(**changes):
        path = write_run(
            "limited", STEPS, study=study, phases=("train", "generate"), change=without_requests, **changes
        )
        code = main(["report", str(path)])
        return code, " ".join(capsys.readouterr().out.split())

    return read


def test_a_run_whose_limit_left_out_all_requests_is_valid(report_limited_run):
    """The report shows the measured phases; a skipped phase has no table and no control."""
    code, text = report_limited_run(skipped=("cold", "merged", "requests"))
    assert code == EXIT_PASS
    assert "training" in text
    assert "generation" not in text


def test_missing_requests_that_were_not_skipped_make_a_run_invalid(report_limited_run):
    """A planned phase that was not skipped needs its control."""
    code, text = report_limited_run()
    assert code == EXIT_INVALID
    assert text.startswith("INVALID: the control of phase 'generate' was not measured")


LINE = "profile lora-or-qlora:lora-r16 --phase generate"


@pytest.fixture
def profile(requests_profile):
    return requests_profile


def diagnose_profile(profile):
    served, merged = request_accounts(profile)
    return served, merged, diagnose_requests(gather_request_evidence(profile, served, merged))


def test_the_lines_of_a_request_add_up(profile):
    """Phases and remainder add up to the time of the request; a decoding pass has its share of the time of decoding."""
    served, merged = request_accounts(profile)
    assert sum(span.value for span in served.whole.phases.values()) == pytest.approx(served.whole.step.value - 0.001)
    assert served.whole.remainder.value == pytest.approx(0.001)
    assert served.decode.time.value == pytest.approx(0.01)
    assert (served.decode.calls, merged.decode.calls) == (20.0, 10.0)


def test_the_copied_head_and_the_adapter_are_found(profile):
    """The head costs half of its profiled time, less one read of its weight; the adapter costs what merging gains."""
    *_, findings = diagnose_profile(profile)
    assert [finding.code for finding in findings] == ["weight-copied", "adapter-unmerged"]
    assert findings[0].cost_s == pytest.approx(0.31 / 2 - 524_288 / 1e10)
    assert findings[1].cost_s == pytest.approx(0.045)
    head = dataclasses.replace(profile, facts=msgspec.structs.replace(profile.facts, head=""))
    assert not diagnose_profile(head)[2][0].suggestion


def test_the_command_prints_one_document(profile, monkeypatch, capsys, tmp_path):
    """With --json stdout has one document only; --try measures the suggested change for the phase of the finding."""
    monkeypatch.setattr(commands_profile, "profile_requests", lambda *args, **options: (profile, tmp_path))
    assert cli.main([*LINE.split(), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [finding["metric"] for finding in document["findings"]] == ["first_token_time_s", "request_time_s"]
    assert set(document["requests"]) == {"served", "merged"}
    assert document["requests"]["served"]["decode"]["time"]["value"] == pytest.approx(0.01)
    assert sum(document["cold_parts_s"].values()) == pytest.approx(6.2)
    tried = []
    monkeypatch.setattr(commands_profile, "_try", lambda *arguments: tried.append(arguments[2]))
    cli.main([*LINE.split(), "--try", "--json"])
    cli.main([*LINE.split(), "--try", "adapter-unmerged", "--json"])
    assert [dict(finding.changes) for finding in tried] == [{"copy_head_input": True}, {"merge_adapter": True}]
    capsys.readouterr()
    assert cli.main([*LINE.split(), "--try", "padding"]) == 2
    assert "no such finding" in capsys.readouterr().err

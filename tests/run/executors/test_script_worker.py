"""A trial of a script by what its process says: what it requires of itself, and what is not written down of it."""

from __future__ import annotations

import pytest

from harness.records import codec
from harness.run.executors import Place, WorkerLostError
from harness.run.executors.script import TOKENS
from harness.run.executors.script_worker import ScriptWorker
from harness.run.plan import make_plan
from harness.run.site import request_of, site_of
from harness.studies.script_study import study_of_command
from kernels_check import Check

URL = "https://me:hf_abc@example.org/data?token=xyz"


class Talk:
    """A process that says what it is given to say."""

    closed = False

    def __init__(self, begun, *answers):
        self.begun, self.answers, self.told, self.killed = begun, list(answers), [], False

    def first_word(self, timeout_s):
        return {"begin": {"pid": 1, "source": "loop", **self.begun}}

    def tell(self, message):
        self.told.append(message)

    def hear(self, timeout_s):
        return self.answers.pop(0)

    def age_s(self):
        return 1.0

    def kill(self):
        self.killed = True


def step(number, check=None):
    checks = None if check is None else [codec.to_json(check)]
    return {"steps": [{"number": number, "step_time_s": 0.1, "cpu_time_s": 0.1, "loss": 2.0, "checks": checks}]}


@pytest.fixture
def prepared(tmp_path):
    """A function that gives a worker whose process is this one and stands before its first step, by a study of these
    requirements."""

    def prepare(process, **requirements):
        study = study_of_command("python train.py", requirements=requirements)
        plan = make_plan(study, phases=("train",), interleaving="lockstep")
        slot, site = plan.slots[0], site_of(study.workload, TOKENS, "cpu")
        request = request_of(plan, slot, site, Place(scratch=str(tmp_path), log_path=str(tmp_path / "log")))
        worker = ScriptWorker(lambda asked: process)
        for word, arguments in (("prepare", {"request": codec.to_json(request)}), ("build", {})):
            assert worker.ask(word, slot.trial, 5.0, **arguments).status == "ok"
        return worker

    return prepare


@pytest.mark.parametrize(
    ("status", "found"), [("active", ("ok", None)), ("fallback", ("invalid", "RequiredPathNotActive"))]
)
def test_what_the_script_itself_requires_is_looked_at(prepared, status, found):
    """Its second step is watched for it, and a trial that lacks it is invalid, though the study requires nothing."""
    check = Check(path="base.bits", required=4, observed=16, status=status, reason="16 bits")
    process = Talk({"required": {"base.bits": 4}}, step(1), step(2, check))
    fragment = prepared(process).ask("verify", "r0-train", 5.0)
    assert (fragment.status, fragment.failure and fragment.failure.kind) == found
    assert [told.get("watch") for told in process.told] == [None, {"base.bits": 4}]


def test_what_the_study_requires_goes_before(prepared):
    """Of one path; of others both count."""
    process = Talk({"required": {"base.bits": 16, "mode": "train"}}, step(1), step(2))
    fragment = prepared(process, **{"base.bits": 4}).ask("verify", "r0-train", 5.0)
    assert process.told[1]["watch"] == {"base.bits": 4, "mode": "train"}
    assert (fragment.status, fragment.failure.kind) == ("invalid", "RequiredPathNotSeen")


STEP = {"number": 1, "step_time_s": 0.1, "cpu_time_s": 0.1}
NO_WORDS = {
    "steps of a number": {"steps": 5},
    "steps of nothing": {"steps": None},
    "a step of a number": {"steps": [5]},
    "a step of nothing": {"steps": [None]},
    "too few steps": {"steps": []},
    "too many steps": {"steps": [STEP] * 5000},
    "no word": {},
    "another word": {"peaks": {}},
    "two words": {"end": {"error": None}, "fault": "x"},
    "an unknown word": {"steps": [STEP], "stop": 1},
    "an end of a number": {"end": 3},
    "an end of nothing": {"end": None},
    "an end of a list": {"end": [1]},
    "an error of a number": {"end": {"error": 5}},
    "a fault of a number": {"fault": 5},
    "no time": {"steps": [STEP | {"step_time_s": 0.0}]},
    "a time before": {"steps": [STEP | {"step_time_s": -1.0}]},
    "a time without end": {"steps": [STEP | {"step_time_s": 1e300}]},
    "a time that is none": {"steps": [STEP | {"step_time_s": "NaN"}]},
    "fewer than no tokens": {"steps": [STEP | {"real_tokens": -1}]},
    "a check of a number": {"steps": [STEP | {"checks": [5]}]},
    "a check of nothing": {"steps": [STEP | {"checks": [{"path": "x"}]}]},
}


@pytest.mark.parametrize("word", NO_WORDS.values(), ids=NO_WORDS)
@pytest.mark.parametrize("asked", ["verify", "warm_up", "turn", "finish_training"])
def test_what_a_script_cannot_mean_is_a_crashed_trial(prepared, asked, word):
    """Whatever it is and whenever it comes, its trial is a row with the reason, and its process is killed."""
    process = Talk({}, word)
    with pytest.raises(
        WorkerLostError, match="no answer that can be read, and was killed: a word of the script"
    ) as lost:
        prepared(process).ask(asked, "r0-train", 5.0, **({"steps": 1} if asked == "turn" else {}))
    assert (lost.value.status, lost.value.failure.phase, lost.value.failure.kind) == ("crashed", asked, "Garbled")
    assert process.killed


@pytest.mark.parametrize("word", [{}, {"end": 3}, {"end": None}, {"steps": [STEP]}, {"fault": []}])
def test_what_a_script_cannot_mean_when_it_is_stopped_is_a_crashed_trial(prepared, word):
    """Its steps have been taken, and who says such a thing cannot be believed of them."""
    total = study_of_command("python train.py").protocol.total_steps + 2
    process = Talk({}, *(step(number) for number in range(1, total)), {"peaks": {}}, word)
    with pytest.raises(WorkerLostError, match="a word of the script"):
        prepared(process).ask("finish_training", "r0-train", 5.0)


@pytest.mark.parametrize("peaks", [{"peaks": 5}, {"peaks": {"x": "y"}}, {"peaks": {"host_peak_train_bytes": -1}}, {}])
def test_peaks_that_cannot_be_are_a_crashed_trial(prepared, peaks):
    """As anything that a script says."""
    total = study_of_command("python train.py").protocol.total_steps + 2
    process = Talk({}, *(step(number) for number in range(1, total)), peaks)
    with pytest.raises(WorkerLostError, match="a word of the script"):
        prepared(process).ask("finish_training", "r0-train", 5.0)


@pytest.mark.parametrize(
    "begun", [{"pid": "x"}, {"planned_steps": -1}, {"planned_steps": 10**30}, {"memory": {"x": -1}}, {"source": "y"}]
)
def test_a_beginning_that_cannot_be_is_a_crashed_trial(prepared, begun):
    """Before anything was asked of it."""
    with pytest.raises(WorkerLostError, match="a word of the script"):
        prepared(Talk(begun))


def test_what_a_script_says_without_end_is_cut(prepared):
    """Of an error that is a book the beginning and the end are kept."""
    told = {"error": "x" * 10**6, "message": "y" * 10**6, "traceback": "z" * 10**6}
    fragment = prepared(Talk({}, {"end": told})).ask("verify", "r0-train", 5.0)
    assert len(codec.dumps(fragment)) < 20_000


def test_credentials_in_what_a_script_dies_of_are_not_written(prepared):
    """Neither in the message nor in the traceback; the rest of the address stays."""
    told = {"error": "HTTPError", "message": f"401 for {URL}", "traceback": f"Traceback\n  get({URL!r})\n"}
    fragment = prepared(Talk({}, {"end": told, "steps": []})).ask("verify", "r0-train", 5.0)
    assert fragment.status == "crashed"
    assert "HTTPError in step 1: 401 for https://***@example.org/data?***" in fragment.failure.message
    for secret in ("hf_abc", "xyz"):
        assert secret not in fragment.failure.message + fragment.failure.traceback


def test_credentials_in_what_a_script_could_not_be_stopped_for_are_not_written(prepared):
    """It is a notice of a trial that counts."""
    total = study_of_command("python train.py").protocol.total_steps + 2
    told = {"end": {"error": "HTTPError", "message": f"401 for {URL}"}, "steps": []}
    process = Talk({}, *(step(number) for number in range(1, total)), {"peaks": {}}, told)
    fragment = prepared(process).ask("finish_training", "r0-train", 5.0)
    (notice,) = fragment.notices
    assert (notice.code, fragment.status, process.killed) == ("not-stopped", "ok", True)
    assert "401 for https://***@example.org" in notice.message
    assert "hf_abc" not in notice.message

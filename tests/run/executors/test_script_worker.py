"""The errors of a script's process: credentials in them are redacted, and long texts are cut."""

from __future__ import annotations

import pytest

from lorameter.records import codec
from lorameter.run.executors import TrialFiles
from lorameter.run.executors.script import TOKENS
from lorameter.run.executors.script_worker import ScriptWorker
from lorameter.run.plan import make_plan
from lorameter.run.trial_setup import request_of, site_of
from lorameter.studies.script_study import study_of_command

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
        request = request_of(plan, slot, site, TrialFiles(scratch=str(tmp_path), log_path=str(tmp_path / "log")))
        worker = ScriptWorker(lambda asked: process)
        for word, arguments in (("prepare", {"request": codec.to_json(request)}), ("build", {})):
            assert worker.ask(word, slot.trial, 5.0, **arguments).status == "ok"
        return worker

    return prepare


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

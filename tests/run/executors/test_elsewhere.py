"""An executor of another machine: one module and one line, and nothing that is said of a run is read here instead."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.machine import provenance
from harness.run.executors import EXECUTORS, open_executor
from harness.run.measure import Arm, measure, plan_study

MODULE = '''
from pathlib import Path

from harness.machine.provenance import Facts, Machine
from harness.records.preparation import BaseSummary, Hello, TokenSummary
from harness.records.record import Fragment
from harness.run.executors import Place

GIB = 2**30
THERE = "/there/runs"


class Elsewhere:
    """A machine in another building."""

    start_latency_s = 0.2

    def __init__(self):
        self.requests, self.cleared, self.cold, self.free = [], [], [], 24 * GIB

    def machine(self):
        return Machine(
            device="cuda", device_name="Card in another building", device_memory_bytes=80 * GIB, driver="999.1",
            cuda="13.9", cpu_model="Other CPU", cpus=64, memory_bytes=512 * GIB, avx512_bf16=False, kernel="9.9",
            python="3.14.1",
        )

    def device_id(self):
        return "the card in another building"

    def free_bytes(self):
        return self.free

    def facts(self):
        card = {"power_limit_w": 345.0}
        return Facts(
            machine=self.machine(), settings={"system": {"governor": "there"}, "card": card},
            libraries={"torch": "99.0"}, git={"commit": "c" * 40, "dirty": False},
        )

    def start(self, folder, threads):
        self.folder = folder

    def hello(self):
        return Hello(harness="1.0 there", pid=7, import_time_s=2.5, device="cuda", torch="99.0")

    def lanes(self, threads):
        return 1

    def prepare_base(self, request):
        return BaseSummary(
            path=f"{THERE}/base", hash="b" * 64, base="b", bytes=1, conversions=0, quantisations=0, seconds=0.0,
        )

    def prepare_tokens(self, workload, *, keep=True):
        return TokenSummary(
            path=f"{THERE}/tokens.safetensors", hash="abc", data="synthetic", synthetic=True,
            tokenizer_substituted=False, train_sequences=1, real_tokens=9, padded_tokens=1, records=1,
        )

    def make_place(self, trial, log):
        return Place(scratch=f"{THERE}/scratch/{trial}", log_path=f"{THERE}/logs/{log}.log")

    def fetch(self, trial, name, folder):
        (folder / name).write_text(trial)
        return folder / name

    def clear_place(self, trial):
        self.cleared.append(trial)

    def launch(self):
        return self

    def ask(self, command, trial, timeout_s, **arguments):
        if command == "prepare":
            self.requests.append(arguments["request"])
        if command == "turn":
            names = ("step_time_s", "step_cpu_time_s")
            return Fragment(samples=dict.fromkeys(names, (0.1,) * arguments["steps"]))
        return Fragment()

    def cold_start(self, request):
        self.cold.append(request)
        return Fragment(samples={"cold_start_time_s": (1.0,)})

    def close(self):
        pass


def open_executor(*, host=None, label=""):
    return Elsewhere()
'''


class Silent:
    """A display that shows nothing."""

    def starting(self, plan, run_id):
        pass

    def tokens_prepared(self, data):
        pass

    def trial_phase(self, slot, phase):
        pass

    def trial_ended(self, record):
        pass


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The executor of a module that was added to the table, on a parent that must not be asked of its machine."""
    (tmp_path / "building.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "building", raising=False)
    monkeypatch.setitem(EXECUTORS, "elsewhere", "building")

    def asked(*_, **__):
        raise AssertionError("the parent's own machine was asked")

    for name in (
        "probe_machine",
        "free_bytes",
        "free_device_memory",
        "device_id",
        "settings",
        "library_version",
        "git_state",
    ):
        monkeypatch.setattr(provenance, name, asked)
    return open_executor("elsewhere")


@pytest.fixture
def run(elsewhere, small_study, tmp_path):
    """A run of the small study that was measured there."""
    plan, _ = plan_study(small_study, elsewhere.machine(), free_bytes=elsewhere.free_bytes())
    arms = [Arm(name=name, executor=elsewhere) for name in {slot.arm for slot in plan.slots}]
    return measure(plan, runs=tmp_path / "runs", display=Silent(), arms=arms)


def test_what_is_said_of_the_machine_is_what_the_executor_says(run, elsewhere):
    """Manifest and fingerprint: device, memory, software, settings, commit and worker of the other machine."""
    said = run.manifest.provenance
    assert (said["device_name"], said["device_memory_bytes"], said["cpu_model"]) == (
        "Card in another building", 80 * 2**30, "Other CPU",
    )  # fmt: skip
    assert (said["kernel"], said["python"], said["libraries"]) == ("9.9", "3.14.1", {"torch": "99.0"})
    assert said["settings"]["system"] == {"governor": "there"}
    assert said["git"]["commit"] == "c" * 40
    assert said["worker"] == {"device": "cuda", "torch": "99.0", "import_time_s": 2.5, "harness": "1.0 there"}
    assert run.manifest.tokens["real_tokens"] == 9
    assert "path" not in run.manifest.tokens
    compared = provenance.comparable(said)
    assert (compared["device_name"], compared["driver"], compared["power_limit_w"]) == (
        "Card in another building", "999.1", 345,
    )  # fmt: skip
    assert run.manifest.fingerprint == provenance.fingerprint(said)
    assert {record.status for record in run.records} == {"ok"}


def test_a_trial_is_sent_to_the_folders_of_its_machine(run, elsewhere):
    """Tokens, scratch and log by the paths that hold there; nothing of them is made here, and each is cleared there."""
    assert elsewhere.requests
    for request in elsewhere.requests:
        assert request["tokens_path"] == "/there/runs/tokens.safetensors"
        assert request["scratch"] == f"/there/runs/scratch/{request['trial']}"
        assert request["log_path"] == f"/there/runs/logs/{request['trial']}.log"
        assert request["device"] == "cuda"
    assert {*elsewhere.cleared} == {record.trial for record in run.records}
    assert {request.scratch for request in elsewhere.cold} <= {request["scratch"] for request in elsewhere.requests}
    assert not Path("/there").exists()
    assert not [*(run.path / "logs").iterdir()]


def test_the_level_goes_by_the_memory_that_is_free_there(elsewhere, small_study):
    """Where the other machine has none left, its trials are not live together, whatever is free here."""
    plan, _ = plan_study(small_study, elsewhere.machine(), free_bytes=elsewhere.free_bytes())
    assert plan.interleaving == "lockstep"
    elsewhere.free = 1
    plan, notices = plan_study(small_study, elsewhere.machine(), free_bytes=elsewhere.free_bytes())
    assert plan.interleaving == "replicates"
    assert "memory-taken" in {notice.code for notice in notices}


def test_an_unknown_executor_is_named_with_those_there_are():
    """Before anything is started."""
    with pytest.raises(UsageError, match=r"executor 'moon': not known\. Use one of local"):
        open_executor("moon")


def test_every_executor_of_the_table_can_be_opened():
    """Each answers for its machine before it is started."""
    for name in EXECUTORS:
        executor = open_executor(name)
        assert executor.machine().cpus >= 1
        executor.close()


def test_the_environment_names_an_executor(monkeypatch):
    """Every command opens it; a name that there is none of is refused like any other."""
    monkeypatch.setenv("LORAMETER_EXECUTOR", "nowhere")
    with pytest.raises(UsageError, match="executor 'nowhere': not known"):
        open_executor()
    assert open_executor("local") is not None

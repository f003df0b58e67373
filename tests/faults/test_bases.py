"""A base that cannot be prepared: a refusal of the system is said, and whatever else is wrong costs no trial."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest

from lorameter.models import bases
from lorameter.records.os_errors import SystemLimitError
from lorameter.run.plan import make_plan
from lorameter.run.prepare import prepare_bases
from lorameter.run.workers import WorkerLostError
from lorameter.run.workers.local import LocalExecutor
from lorameter.studies.request import BaseRequest


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    """A real one; its zygote is what costs."""
    local = LocalExecutor()
    local.start(tmp_path_factory.mktemp("run"), 1)
    local.hello()
    yield local
    local.close()


@pytest.fixture
def home(tmp_path):
    """A folder for bases; the zygote has read the environment, so what it names there becomes a link."""
    there = Path(os.environ[bases.ENV_BASES])
    there.rename(tmp_path / "others")
    (tmp_path / "bases").mkdir()
    there.symlink_to(tmp_path / "bases")
    yield tmp_path / "bases"
    there.unlink()
    (tmp_path / "others").rename(there)


def asked(study, seed):
    """The request for a base that no other test has made."""
    workload = dataclasses.replace(study.workload, data_seed=seed)
    return BaseRequest(workload=workload, variant=study.variants[0], device="cpu", threads=1, log_path="")


def test_a_base_that_does_not_fit_is_refused(executor, small_study, home, tiny_disk):
    """The process is real and its disk full: what, and what to do; nothing is left of it, and with room it is made."""
    ballast = tiny_disk(home, 512, 16 * 1024)
    with pytest.raises(
        SystemLimitError, match=r"the base tiny-llama, bfloat16: .*No space left on device\. Free space"
    ):
        executor.prepare_base(asked(small_study, 501))
    assert not list(home.glob("*/*"))
    ballast.unlink()
    assert executor.prepare_base(asked(small_study, 501)).conversions == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_process_that_dies_over_a_base_ends_no_run(executor, small_study, monkeypatch, number):
    """Each trial makes its own, and a notice says so."""
    launch = LocalExecutor.launch

    def launch_doomed(self):
        worker = launch(self)
        os.kill(worker.pid, number)
        return worker

    class Quiet:
        def trial_phase(self, slot, phase):
            pass

    monkeypatch.setattr(LocalExecutor, "launch", launch_doomed)
    with pytest.raises(WorkerLostError, match="ended with"):
        executor.prepare_base(asked(small_study, 504))
    prepared = prepare_bases(make_plan(small_study), {"": executor}, "cpu", Quiet())
    assert not prepared.folders
    assert [notice.code for notice in prepared.notices] == ["base-not-prepared"] * 2

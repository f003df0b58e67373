"""GPU tests that a child of the zygote uses the device, and that the check of a trial does not affect the steps that
are timed after it."""

from __future__ import annotations

import statistics

import pytest

from lorameter.records import codec
from lorameter.run.plan import make_plan
from lorameter.run.prepare import RunContext, make_request
from lorameter.run.workers.local import LocalExecutor

pytestmark = pytest.mark.gpu
STEPS = 60


@pytest.fixture
def ask(small_study, tmp_path):
    """A function that sends a command to a prepared worker on the GPU and returns its fragment."""
    executor = LocalExecutor()
    executor.start(tmp_path, 1)
    try:
        assert executor.hello().device == "cuda"
        tokens = executor.prepare_tokens(small_study.workload)
        site = RunContext(device="cuda", tokens={small_study.workload: tokens})
        plan = make_plan(small_study, phases=["train"])
        slot = plan.slots[0]
        worker = executor.launch()

        def ask(command, **arguments):
            fragment = worker.ask(command, slot.trial, 300, **arguments)
            assert fragment.status == "ok", fragment.failure
            return fragment

        ask(
            "prepare",
            request=codec.to_json(make_request(plan, slot, site, executor.make_place(slot.trial, slot.trial))),
        )
        yield ask
        worker.close()
    finally:
        executor.close()


def test_a_child_of_the_zygote_uses_the_gpu(ask):
    """The zygote forks only with one thread and without a started driver, and its child trains on the device."""
    ask("build")
    assert ask("turn", steps=1).samples["step_time_s"]


def test_a_step_is_as_fast_after_the_check_as_before(ask):
    """CUPTI is torn down after the profiler's session: the medians of many launch-bound steps agree within 3 % plus the
    difference of two medians before it."""
    ask("build")
    ask("turn", steps=STEPS)  # let launches, the allocator and the clocks settle
    first, before = (statistics.median(ask("turn", steps=STEPS).samples["step_time_s"]) for _ in range(2))
    ask("verify")
    after = statistics.median(ask("turn", steps=STEPS).samples["step_time_s"])
    assert after <= before * 1.03 + 2 * abs(before - first)

"""On a real card: what was watched in a trial's process does not stay in the steps that are timed after it."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from harness.records import codec
from harness.run.executors.local import LocalExecutor
from harness.run.plan import make_plan
from harness.run.site import Site, request_of

pytestmark = pytest.mark.gpu
STEPS = 60


@pytest.mark.parametrize("instrument", ["profile", "spy"])
def test_a_step_is_as_fast_after_the_check_as_before(small_study, tmp_path, instrument):
    """CUPTI is torn down with the profiler's session: medians of many launch-bound steps within 3 %."""
    executor = LocalExecutor(threads=1, log_dir=tmp_path)
    executor.start()
    try:
        assert executor.hello()["device"] == "cuda"
        tokens = executor.prepare_tokens(small_study.workload, str(tmp_path))
        site = Site(
            run_path=tmp_path, scratch=tmp_path / "scratch", device="cuda", threads=1, tokens_path=tokens["path"],
            tokens={"hash": tokens["hash"]},
        )  # fmt: skip
        plan = make_plan(small_study, phases=["train"])
        slot = dataclasses.replace(plan.slots[0], instrument=instrument)
        (site.scratch / slot.trial).mkdir(parents=True)
        worker = executor.launch()

        def ask(command, **arguments):
            fragment = worker.ask(command, slot.trial, 300, **arguments)
            assert fragment.status == "ok", fragment.failure
            return fragment

        ask("prepare", request=codec.to_json(request_of(plan, slot, site, slot.trial)))
        ask("build")
        ask("turn", steps=STEPS)  # launches, the allocator and the clocks settle
        before = statistics.median(ask("turn", steps=STEPS).samples["step_time_s"])
        ask("verify")
        after = statistics.median(ask("turn", steps=STEPS).samples["step_time_s"])
        worker.close()
    finally:
        executor.close()
    assert after == pytest.approx(before, rel=0.03)

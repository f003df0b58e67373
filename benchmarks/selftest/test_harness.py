"""The harness measured by itself: what it adds to a step, how fast it starts, what it keeps in memory.

Run by `make proof`; deselected unless `-m selftest` asks. Each test prints its figure with the interval, then judges.
"""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from harness.records.store import read_run
from harness.records.units import format_bytes, format_interval, format_ratio
from harness.report.live import LiveDisplay
from harness.run.executors.local import LocalExecutor, worker_environment
from harness.run.plan import make_plan
from harness.stats import compare_trials, estimate_trials
from harness.studies.study_file import load_study

pytestmark = [pytest.mark.selftest, pytest.mark.timeout(3600)]  # steps in eight ways take a quarter of an hour
HERE = Path(__file__).parent
COMMITTED = HERE.parents[1] / "reports" / "2026-11-25_amd-epyc-2cpu_lora-or-qlora"
REPLICATES, TURNS = 12, 150


@pytest.fixture(scope="module")
def loops():
    """Twelve fresh processes, in each of which steps by the harness and bare ones take turns."""
    return [
        json.loads(
            subprocess.run(
                [sys.executable, str(HERE / "bare_loop.py"), str(seed), str(TURNS)],
                env=worker_environment(1), capture_output=True, text=True, check=True,
            ).stdout
        )
        for seed in range(REPLICATES)
    ]  # fmt: skip


def over(loops, name, base, words, say):
    """The ratio of one kind of step to another, said."""
    ratio = compare_trials([loop[base] for loop in loops], [loop[name] for loop in loops], pairing="turn")
    said = format_ratio(ratio.ratio, ratio.low, ratio.high)
    say(f"{words}: {said} ({REPLICATES} processes × {TURNS} turns)")
    return ratio


WAYS = {
    "scheduled": "a bare loop that steps its schedule",
    "summed": "a bare loop that adds its loss to a sum of zero",
    "divided": "a bare loop that divides its loss by one",
    "freed": "a bare loop that lets its loss and the graph behind it go within the step",
    "seated": "a bare loop behind the switch of adapter and random numbers",
    "alone": "the step without a turn around it",
    "unmetered": "the step in its turn, without meters",
}
"""Where what a recorded step takes more may come from, by name and in words."""


def test_a_timed_step_costs_what_a_bare_loop_costs(loops, say):
    """Target at most 1.005 for what is recorded, over a bare loop that frees its graph within the step.

    So does any loop whose next step gives the name of its loss to another. One that keeps it until the clock has been
    read leaves the end of the graph outside: the way "freed" over "bare".

    What a turn takes beside its steps (reading the meters, the switch of random numbers) is in no number.
    """
    recorded = over(loops, "metered", "bare", "the step as recorded, over that of a bare loop", say)
    for name, words in WAYS.items():
        over(loops, name, "bare", f"{words}, over the same", say)
    over(loops, "turn", "bare", "the whole turn of one step, what is in no number included, over the same", say)
    whole = over(loops, "metered", "freed", "the step as recorded, over that of a bare loop with its graph freed", say)
    assert recorded.ratio is not None
    assert whole.ratio is not None
    assert whole.ratio <= 1.005, whole.reason


def test_the_meters_cost_a_timed_step_nothing(loops, say):
    """All meters around a step against none: the whole interval below 1.005."""
    ratio = over(loops, "metered", "unmetered", "the step as recorded, with all meters around it over without", say)
    assert ratio.high is not None
    assert ratio.high < 1.005, "the meters may add 0.5 % to a timed step"


def test_help_answers_at_once(say):
    """`lorameter --help`, a new interpreter each time; target under 0.15 s."""
    command = [str(Path(sys.executable).with_name("lorameter")), "--help"]
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append((time.perf_counter() - begin,))
    estimate = estimate_trials(times)
    say(f"lorameter --help: {format_interval(estimate.value, estimate.low, estimate.high, 's')} over 20 processes")
    assert estimate.value < 0.15


def test_a_trial_starts_within_a_tenth_of_a_second(say, tmp_path):
    """From the request for a fork to the child's first instruction, with a warm zygote; target 0.1 s."""
    executor = LocalExecutor()
    executor.start(tmp_path, 1)
    try:
        executor.hello()
        latencies = []
        for _ in range(20):
            worker = executor.launch()
            latencies.append((worker.start_latency_s,))
            worker.close()
    finally:
        executor.close()
    estimate = estimate_trials(latencies)
    say(f"fork to first instruction: {format_interval(estimate.value, estimate.low, estimate.high, 's')} over 20 forks")
    assert estimate.value < 0.1


def test_the_grid_of_a_run_under_way_costs_little_between_turns(say):
    """One redrawing of the default study at 8 replicates; target 50 ms of CPU time, at most ten a second,
    and never while a step is timed: the parent draws before it asks for a turn."""
    study = load_study("lora-or-qlora", device="cpu")
    plan = make_plan(dataclasses.replace(study, protocol=study.protocol.with_effort("standard")), phases=("train",))
    out = io.StringIO()
    display = LiveDisplay(Console(file=out, width=120, force_terminal=True))
    given = {record.name: record for record in read_run(str(COMMITTED), COMMITTED.parent).records if record.settled}
    drawn, ended = [], []
    with display:
        display.starting(plan, "run")
        for number, slot in enumerate(plan.slots):
            length, phase = out.tell(), ("verify", "warm_up")[number % 2]  # a phase that is new is drawn at once
            begin = time.process_time()
            display.trial_phase(slot, phase)
            drawn.append((time.process_time() - begin,))
            assert out.tell() > length, "nothing was drawn"
            begin = time.process_time()
            display.trial_ended(given[slot.variant.name].replaced(trial=slot.trial, replicate=slot.replicate))
            ended.append((time.process_time() - begin,))
    for words, times in (
        ("the grid drawn between two turns", drawn),
        ("drawn with its ratios at a trial's end", ended),
    ):
        estimate = estimate_trials(times)
        said = format_interval(estimate.value, estimate.low, estimate.high, "s")
        say(f"{words}: {said} of CPU time over {len(times)} drawings")
        assert estimate.value < 0.05


def test_the_default_study_fits_its_memory_and_leaks_nothing(say):
    """Proportional set size of zygote and children, sampled 5 times a second; target below 3 GiB, trials alike."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "harness.cli", "run", "lora-or-qlora", "--json"]
        command += ["--replicates", "2", "--runs-dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        peak, begin = 0, time.monotonic()
        while process.poll() is None:
            peak = max(peak, sum(_pss(child) for child in psutil.Process(process.pid).children(recursive=True)))
            time.sleep(0.2)
        seconds = time.monotonic() - begin
        output, _ = process.communicate()
        document = json.loads(output)
        records = read_run(document["run"], Path(folder)).records
    assert document["trials"] == {"ok": len(records)}
    baselines = [size for record in records if (size := record.memory.get("host_baseline_bytes"))]  # of solo trials
    begins = " to ".join(dict.fromkeys(format_bytes(size) for size in (min(baselines), max(baselines))))
    say(
        f"zygote and children: at most {format_bytes(peak)} (proportional set size, {len(records)} trials in "
        f"{seconds:.0f} s); a trial begins with {begins}"
    )
    assert peak < 3 * 2**30
    assert max(baselines) - min(baselines) < 0.01 * min(baselines), "a trial left something to the next"


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it ended between being listed and being read
        return 0

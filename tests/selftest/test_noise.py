"""The noise program, on a small recording whose noise is known, and on the real one where it is at hand."""

import math
import os
from collections import Counter
from itertools import product

import numpy as np
import pandas as pd
import pytest

ARMS = {"A1": 0.0, "A2": 0.0, "B2": 0.023, "B5": math.log(1.05), "B10": 0.08}
STEPS = 6


def write(folder, *, turn_sd=0.005, process_sd=0.25, replicates=20, occupancy=1.0):
    """Three files with normal noise: `turn_sd` between the sides of a turn, `process_sd` between processes."""
    rng = np.random.default_rng(5)

    def ns(log_time):
        return round(1e7 * math.exp(log_time))

    shared = [
        {"proc": proc, "round": step, "pos": 0, "arm": arm, "ns": ns(effect + luck + rng.normal(0, 0.001))}
        for proc in range(replicates)
        for arm, effect in ARMS.items()
        for luck in [rng.normal(0, turn_sd)]
        for step in range(STEPS)
    ]
    pairs = [
        {"pair": pair, "kind": kind, "round": step, "arm": arm, "ns": ns(effect * (arm == "b") + luck)}
        for pair, (kind, effect) in enumerate([("AA", 0.0), ("AB5", ARMS["B5"])] * 6)
        for arm in "ab"
        for luck in [rng.normal(0, turn_sd)]
        for step in range(STEPS)
    ]
    single = [
        {"arm": arm, "block": block, "it": step, "ns": time, "cpu_ns": round(occupancy * time)}
        for block, (arm, effect) in product(range(replicates), ARMS.items())
        for luck in [rng.normal(0, process_sd)]
        for step in range(STEPS)
        for time in [ns(effect + luck + rng.normal(0, 0.05))]
    ]
    for name, rows in (("one_process", shared), ("lockstep", pairs), ("processes", single)):
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv.gz", index=False)
    return folder


def test_quiet_turns_hold(program, tmp_path, capsys):
    """With turns of half a percent of noise every limit holds: exit 0, one table with ours and the others' rules."""
    noise = program("noise")
    assert noise.main([str(write(tmp_path)), "--draws", "300"]) == 0
    printed = capsys.readouterr().out
    assert "holds: every limit" in printed
    for rule in ("lorameter by turn, two processes", "lorameter unpaired (Welch)", "criterion", *noise.RULES):
        assert rule in printed
    assert "simulated, sd" in printed
    assert "drawn of 20" in printed


def test_noisy_turns_do_not_hold(program, tmp_path, capsys):
    """With turns of 10 % of noise a slow-down of 5 % is missed: exit 1, and the reason names rule, size and share."""
    assert program("noise").main([str(write(tmp_path, turn_sd=0.1)), "--draws", "100"]) == 1
    printed = capsys.readouterr().out
    assert "does not hold: lorameter by turn, two processes" in printed
    assert "8 replicates: 5 % slower is found in" in printed


def test_quiet_processes_do_not_hold(program, tmp_path, capsys):
    """Where blocks are quiet enough to be called equivalent, the statement that they are not is withdrawn: exit 1."""
    assert program("noise").main([str(write(tmp_path, process_sd=0.001)), "--draws", "50"]) == 1
    assert "lorameter by replicate (block)" in capsys.readouterr().out.split("does not hold:")[1]


def test_facts_are_those_of_the_recording(program, tmp_path):
    """The printed noise facts give back what the recording was made with."""
    recording = program("recording")
    read = recording.read(write(tmp_path, process_sd=0.25, occupancy=0.97))
    facts = dict(recording.facts(read))
    assert facts["dropped as warm-up"] == "one process 0 of 6, lockstep 0 of 6, processes 0 of 6"
    between, within = (float(part.split(" %")[0]) for part in facts["sd of log time between / within"].split(" / "))
    assert between == pytest.approx(25, abs=7)
    assert within == pytest.approx(5, abs=0.7)
    assert float(facts["intraclass correlation"]) == pytest.approx(between**2 / (between**2 + within**2), abs=0.01)
    assert facts["the same, occupancy ≥ 0.95"].endswith("(100.0 % kept)")
    assert float(facts["… in turns, two processes"].split(" %")[0]) == pytest.approx(0.7, abs=0.5)


def test_warm_up_is_dropped_where_there_is_enough(program):
    """Twenty steps go where at least ten remain; a shorter recording is taken whole."""
    recording = program("recording")

    def steps_left(count):
        rows = [{"arm": "A1", "block": 0, "it": step, "ns": step + 1} for step in range(count)]
        return recording.timed(pd.DataFrame(rows), ["arm", "block"], "it", "ns")[0]["A1"].shape[1]

    assert (steps_left(30), steps_left(29)) == (10, 29)


def test_draws_do_not_repeat(program):
    """Within a run no replicate is drawn twice, and every one can be."""
    chosen = program("noise").choose(np.random.default_rng(6), 500, 20, 8)
    assert all(len(set(run)) == 8 for run in chosen.tolist())
    assert set(chosen.ravel().tolist()) == set(range(20))


def test_simulated_turns_have_the_recorded_spread(program):
    """Simulated replicates scatter as recorded ones, and the slower side is slower by 5 %."""
    recording = program("recording")
    rng = np.random.default_rng(7)
    base = np.exp(rng.normal(0, 0.1, (40, 21)))
    luck = np.exp(rng.normal(0, 0.03, (40, 1)))
    noise = recording.turn_noise((base, base * luck))
    assert noise.sd == pytest.approx(np.log(luck).std(ddof=1))
    run = noise.draw(rng, 400, 8)
    same, slow = (recording.log_ratios(run.base[:, i], x[:, i]) for i, x in ((0, run.same), (1, run.slow)))
    assert same.std() == pytest.approx(noise.sd, rel=0.15)
    assert slow.mean() == pytest.approx(math.log(1.05), abs=0.006)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_every_peer_finds_a_threefold_time(program, factor):
    """Each emulated rule is silent on one and the same times, and finds a threefold time in quiet processes."""
    rules = program("peer_rules").RULES
    base = np.random.default_rng(8).lognormal(0, 0.02, (40, 8, 60))
    for name, rule in rules.items():
        assert rule(base, base * factor).tolist() == [factor > 1] * 40, name


def test_rules_on_iterations_mistake_luck_for_speed(program):
    """On processes that differ by 25 % the t-test over iterations cries wolf; over processes it keeps its rate."""
    rules = program("peer_rules")
    rng = np.random.default_rng(9)
    base, candidate = np.exp(rng.normal(0, 0.25, (2, 400, 8, 1)) + rng.normal(0, 0.1, (2, 400, 8, 60)))
    assert rules.RULES["Student t, all iterations"](base, candidate).mean() > 0.25
    assert rules.t_test(base.mean(axis=2), candidate.mean(axis=2)).mean() < 0.05


def test_every_limit_is_judged(program):
    """A rule over its alarms, an unpaired `equivalent` and a missed slow-down are each named; other tools are not."""
    noise = program("noise")

    def row(pairing, **same):
        counts = Counter(same)
        design = noise.Design("planted", "drawn", pairing, None)
        return noise.Row("planted", "drawn", {5: counts, 8: counts}, {5: 1.0, 8: 0.5}, design)

    alarms = list(noise.broken([row("replicate", regressed=60, inconclusive=940)]))
    assert [reason.split(": ")[1] for reason in alarms] == [
        "identical code is called regressed in 6.00% of 1000 runs, above 2.5 %"
    ] * 2
    assert any("unpaired times" in reason for reason in noise.broken([row("none", equivalent=1, inconclusive=999)]))
    assert len(list(noise.broken([row("turn", equivalent=1000)]))) == 1
    assert not list(noise.broken([noise.Row("tool", "", {}, {})]))


@pytest.mark.parametrize("lost", ["one_process", "lockstep", "processes"])
def test_missing_file_is_named(program, tmp_path, capsys, lost):
    """A folder without one of the files is refused by that file's name, with exit 2."""
    (write(tmp_path) / f"{lost}.csv.gz").unlink()
    assert program("noise").main([str(tmp_path), "--draws", "1"]) == 2
    assert f"{lost}.csv.gz" in capsys.readouterr().err


def test_too_few_blocks_are_refused(program, tmp_path, capsys):
    """Blocks that do not suffice to draw eight without near repetition are refused with both numbers."""
    assert program("noise").main([str(write(tmp_path, replicates=10)), "--draws", "1"]) == 2
    assert "has 10 blocks, fewer than the 16" in capsys.readouterr().err


def test_the_real_recording_holds(program, capsys):
    """On the recording of a busy machine, named by $LORAMETER_NOISE, lorameter's rules hold."""
    folder = os.environ.get("LORAMETER_NOISE")
    if not folder:
        pytest.skip("$LORAMETER_NOISE does not name the folder of the recorded noise")
    assert program("noise").main([folder, "--draws", "1000"]) == 0, capsys.readouterr().out

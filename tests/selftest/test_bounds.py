"""Tests of the bounds of the proof programs on injected results: a violated bound is reported, and no other one.

Tests of kernels_check on random models and small families: a part of the long program, with injected faults.
"""

import dataclasses
from types import SimpleNamespace

import msgspec
import pytest

import lorameter.stats


def ab_document(verdict="equivalent", low=0.99, high=1.01, *, seconds=40.0, notices=()):
    step = {"verdict": verdict, "ratio": 1.0, "low": low, "high": high}
    return {"step": step, "seconds": seconds, "notices": [{"code": code} for code in notices]}


@pytest.mark.parametrize(
    ("part", "documents", "violation"),
    [
        ("identical", [ab_document()] * 8, ""),
        ("identical", [ab_document()] * 7 + [ab_document("regressed")], "1 of 8 are called slower"),
        ("identical", [ab_document(seconds=50.0)], "took 50 s"),
        ("injected", [ab_document("regressed", 1.03, 1.06)] * 8, ""),
        (
            "injected",
            [ab_document("regressed", 1.03, 1.06)] * 7 + [ab_document()],
            "injected: 7 of 8 are called slower",
        ),
        ("injected", [ab_document("regressed", 1.08, 1.09)] * 8, "0 of 8 intervals cover"),
        ("loaded", [ab_document(seconds=95.0, notices=("cpu-contention",))] * 4, ""),
        (
            "loaded",
            [ab_document(notices=("cpu-contention",)), ab_document()],
            "1 of 2 have no notice of the contention",
        ),
    ],
)
def test_verdicts_are_judged_by_part(program, part, documents, violation):
    """Identical commits are never slower, the interval covers an injected slow-down, and contention has a notice."""
    violations = [*program("verdicts_ab").judge(part, documents, 1.05 if part == "injected" else 1.0)]
    assert bool(violations) == bool(violation)
    assert violation in "".join(violations)


@pytest.mark.parametrize(
    ("step_s", "extra_us", "violation"),
    [(0.01, 99.0, False), (0.01, 101.0, True), (0.4, 1900.0, False), (0.4, 2100.0, True)],
)
def test_the_meter_may_cost_100_us_or_half_a_percent(program, step_s, extra_us, violation):
    """The bound applies to the upper end of the interval of each difference to a step without the meter."""
    scripts = program("own_scripts")

    def replicate(off_us):
        medians = {(clock, *pair): 0.0 for clock in scripts.CLOCKS for pair in scripts.DIFFERENCES}
        medians |= {(clock, scripts.ALONE): step_s for clock in scripts.CLOCKS}
        return medians | {("wall", scripts.ON, "off"): (extra_us + off_us) * 1e-6}

    violations = [*scripts.judge_overhead([replicate(off_us) for off_us in (-0.1, 0.1, -0.1, 0.1)])]
    assert bool(violations) is violation


@pytest.mark.selftest
def test_the_meter_is_switched_off_and_on(program):
    """A wrapped training with the meter switched on and off takes turns with an unwrapped one and leaves a run."""
    scripts = program("own_scripts")
    medians = scripts.measure_replicate(30, 3, "small", 0)
    assert medians["wall", scripts.ALONE] > 0
    assert {(clock, *pair) for clock in scripts.CLOCKS for pair in scripts.DIFFERENCES} < set(medians)


@pytest.mark.parametrize(
    ("count", "bounds", "holds"),
    [(5, {"maximum": 0.05}, True), (9, {"maximum": 0.05}, True), (15, {"maximum": 0.05}, False),
     (75, {"minimum": 0.8}, True), (60, {"minimum": 0.8}, False), (0, {}, True), (1, {"maximum": 0.0}, False),
     (0, {"maximum": 0.0}, True)],
)  # fmt: skip
def test_a_share_is_judged_by_a_binomial_test(program, count, bounds, holds):
    """A share within the chance variation of a hundred draws is within the bounds."""
    assert program("shared").Share("something", count, 100, **bounds).holds is holds


@pytest.mark.parametrize("part", ["coverage", "families", "claims"])
def test_the_statistics_hold_in_few_draws(program, capsys, part):
    """The program prints every share with its bounds."""
    assert program("noise_coverage").main(["--draws", "200", "--part", part]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.count(" of ") > 3


def test_intervals_that_are_too_narrow_are_reported(program, monkeypatch, capsys):
    """The program exits with 1 and prints the share with its bounds."""
    noise = program("noise_coverage")

    def compare(base, candidate, **options):
        found = lorameter.stats.compare_trials(base, candidate, **options)
        return dataclasses.replace(found, low=found.ratio, high=found.ratio)

    monkeypatch.setattr(noise, "compare_trials", compare)
    assert noise.main(["--draws", "100", "--part", "coverage"]) == 1
    assert "does not hold: Gaussian, paired, 5 replicates" in capsys.readouterr().out


def test_large_runs_are_read_within_their_bounds(program, tmp_path, monkeypatch, capsys):
    """A small run keeps every bound; reading that takes longer than allowed is reported."""
    reading = program("reading")
    path = reading.write_run(tmp_path, 3, 2, 20)
    monkeypatch.setattr(reading, "MAX_MEMORY", 1e6)  # the files are small compared with the interpreter
    assert [*reading.judge(path, 30.0, page=False)] == []
    assert capsys.readouterr().out.startswith("8 trials, ")
    monkeypatch.setattr(reading, "copy_run", lambda path: path)
    monkeypatch.setattr(reading, "command_cpu_s", lambda path, *words: 31.0)
    assert len([*reading.judge(path, 30.0, page=False)]) == 2


@pytest.mark.parametrize(("late_s", "count"), [(40.0, 0), (60.0, 1)])
def test_a_real_model_is_judged_by_its_run(program, write_run, late_s, count, capsys):
    """A run is judged by its time, replicates, share of measuring time and intervals; 60 s past the limit breaks a
    bound."""
    from lorameter.records import store
    from lorameter.records.store import TimeBreakdown

    real = program("real_models")
    path = write_run("a", {"plain": [0.1, 0.101, 0.1, 0.1, 0.1], "nf4": [0.12, 0.121, 0.12, 0.12, 0.12]})
    run = store.read_run(str(path), path.parent)
    spending = TimeBreakdown(wall_s=480.0 + late_s, limit_s=480.0, measured_s={"steps": 400.0})
    run = dataclasses.replace(run, manifest=msgspec.structs.replace(run.manifest, spending=spending))
    violations = [*real.judge(run)]
    assert len(violations) == count, violations
    assert "step time of nf4: ± " in capsys.readouterr().out


SEEDS = range(1_000_000, 1_000_004)
"""Seeds outside the range of the long run."""
FAMILIES = ("bart", "beam", "clip", "gemma2", "gpt2", "ibert", "mixtral", "siglip")


@pytest.fixture
def models(program):
    """The program."""
    return program("random_models")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_checks_of_a_random_model_are_true(models, seed):
    """There is no wrong verdict, false alarm or disagreement, and the run continues as its unverified twin does."""
    faults, properties = models.examine(seed)
    assert faults == [], properties


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_checks_of_a_family_agree_with_the_oracle(models, name, capsys):
    """The families cover encoder-decoders, vision, experts, observers, and each attention backend of a CPU."""
    if name not in models.oracle.families():
        pytest.skip(f"this transformers has no {name}")
    assert [*models.oracle.find_family_faults([name])] == []
    assert capsys.readouterr().out.startswith("1 families: 1 ")


@pytest.mark.parametrize(
    ("required", "status", "hidden", "fault"),
    [
        ("flash", "active", False, None),
        ("flash", "fallback", False, "false alarm"),
        ("flash", "unknown", False, "false alarm"),
        ("flash", "unknown", True, None),
        ("flash", "absent", True, "false alarm"),
        ("flash", None, False, "false alarm"),
        ("math", "active", False, "wrong"),
        ("math", "active", True, "wrong"),
        ("math", "unknown", False, None),
        ("fused", "active", False, None),
        ("fused", "fallback", False, None),
    ],
)
def test_a_check_is_compared_with_the_truth(models, required, status, hidden, fault):
    """A requirement must be active exactly if it holds; unknown is right for a path that cannot be observed."""
    truth = models.Truth(holds=frozenset({"flash"}), free=frozenset({"fused"}), hidden=hidden)
    checks = [SimpleNamespace(path="mode", status=status, observed=None, reason="")] if status else []
    found = [*models.find_faults({"mode": truth}, {"mode": required}, checks)]
    assert [one.partition(":")[0] for one in found] == ([fault] if fault else [])


def test_a_fault_ends_the_program_with_1(models, monkeypatch, capsys):
    """The program prints the seed, the fault and the properties of the run; an exception of the run itself is a
    fault."""
    monkeypatch.setattr(models, "examine", lambda seed: (["wrong: mode"] if seed == 3 else [], ["LoRA"]))
    assert models.main(["--many", "3", "--families", "none"]) == 0
    assert models.main(["--many", "5", "--families", "none"]) == 1
    assert "does not hold: seed 3: wrong: mode [LoRA]" in capsys.readouterr().out
    monkeypatch.setattr(models, "examine", lambda seed: 1 / 0)
    assert models.main(["--many", "1", "--families", "none"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out

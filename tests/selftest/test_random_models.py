"""Models drawn at random: the program that judges the judges finds what is planted, and a slice of its runs."""

import random
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels_check

SLICE = range(1_000_000, 1_000_020)
"""Seeds that the long proof does not take."""


@pytest.fixture
def models(program):
    """The program."""
    return program("random_models")


def check(path, status="active", required=None, observed=None):
    return SimpleNamespace(path=path, status=status, required=required, observed=observed, reason="as made up")


@pytest.mark.parametrize("seed", SLICE)
def test_what_is_said_of_a_drawn_model_is_true(models, seed):
    """No wrong active, no false alarm, no disagreement; afterwards the run is its twin that was never watched."""
    faults, about = models.examine(seed)
    assert faults == [], about


@pytest.mark.parametrize(
    ("required", "status", "hidden", "fault"),
    [
        ("flash", "active", False, None),
        ("flash", "fallback", False, "false alarm: path 'flash' is fallback"),
        ("flash", "unknown", False, "false alarm: path 'flash' is unknown"),
        ("flash", "unknown", True, None),
        ("flash", "absent", True, "false alarm: path 'flash' is absent"),
        ("math", "active", False, "wrong: path 'math' is active, true is 'flash' (perhaps 'fused')"),
        ("math", "active", True, "wrong: path 'math' is active"),
        ("math", "unknown", False, None),
        ("fused", "active", False, None),
        ("fused", "fallback", False, None),
    ],
)
def test_a_verdict_is_compared_with_the_truth(models, required, status, hidden, fault):
    """What holds must be active, what does not must not be, and unknown is right where nobody could see."""
    truth = models.Truth(holds=frozenset({"flash"}), free=frozenset({"fused"}), hidden=hidden)
    found = [*models.faults_of("profile", {"path": truth}, {"path": required}, [check("path", status)])]
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


@pytest.mark.parametrize(
    ("instrument", "path", "faults"),
    [("profile", "mode", 1), ("spy", "mode", 1), ("spy", "packing.isolated", 0), ("profile", "packing.isolated", 1)],
)
def test_what_is_left_out_is_a_false_alarm_unless_the_spy_leaves_it_to_a_profile(models, instrument, path, faults):
    """A path without a check."""
    truths = {path: models.Truth(holds=frozenset({True}))}
    assert len([*models.faults_of(instrument, truths, {path: True}, [])]) == faults


@pytest.mark.parametrize(
    ("spied", "faults"),
    [(check("mode", observed="train"), 0), (check("mode", observed="eval"), 1), (check("mode", "fallback"), 1),
     (check("mode", "unknown"), 0), (check("tf32"), 0)],
)  # fmt: skip
def test_instruments_that_say_different_things_disagree(models, spied, faults):
    """Unless one says unknown, or leaves the path out."""
    checks = {"profile": [check("mode", observed="train")], "spy": [spied]}
    assert len([*models.disagreements(checks)]) == faults


@given(st.integers(0, 10**9))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_requirements_are_drawn_from_what_can_be_required(models, seed):
    """Each is a value that the path accepts, and some hold and some do not."""
    truths = {path: models.Truth(holds=frozenset({values[0]})) for path, values in models.CANDIDATES.items()}
    required = models.require(truths, random.Random(seed))
    assert required.keys() == truths.keys()
    assert [path for path, value in required.items() if kernels_check.REQUIREMENTS[path].problem(value)] == []


def test_a_share_is_required_as_a_minimum(program):
    """Up to what is surely there it holds, beyond what may be there it does not."""
    truth = program("drawn_truth").at_least(0.3, 0.5)
    assert truth.holds == {0.0, 0.05, 0.1, 0.2, 0.3}
    assert truth.free == {0.4, 0.5}


def test_bytes_in_four_bits_are_counted_by_hand(program):
    """64 x 32 weights: half a byte each, scales for 64, and tables that may count or not."""
    four_bits = program("drawn_storage")._four_bits
    assert four_bits(2048, double=False) == (1024 + 128, 1024 + 128 + 64)
    assert four_bits(2048, double=True) == (1024 + 32 + 4 + 4, 1024 + 32 + 4 + 4 + 64 + 1024)


def test_a_fault_is_an_exit_status_and_names_its_seed(models, monkeypatch, capsys):
    """Exit 1 with seed, fault and features; exit 0 without any; a run that raises is a fault, too."""
    monkeypatch.setattr(models, "examine", lambda seed: ([f"spy: wrong: mode {seed}"] if seed == 3 else [], ["drawn"]))
    assert models.main(["--many", "3"]) == 0
    assert models.main(["--many", "5"]) == 1
    assert "seed 3: spy: wrong: mode 3\n    of: drawn" in capsys.readouterr().out
    monkeypatch.setattr(models, "examine", lambda seed: 1 / 0)
    assert models.main(["--seed", "9"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_twins_of_a_seed_are_twins(models):
    """Two runs of one seed have the same state and losses, and other seeds other features."""
    ends = []
    for seed in (5, 5, 6):
        run = models.DrawnRun(seed)
        ends.append((models.describe(run), run.step(), run.about))
    assert ends[0] == ends[1]
    assert ends[0][2] != ends[2][2]

"""A meter is judged by the upper end of the wrapped process's interval: on the wall and on its CPUs."""

import pytest


@pytest.fixture
def judged(program, monkeypatch, capsys):
    """A function that has four replicates found with these differences, in µs, of a step; gives the exit code and what
    was printed."""
    live = program("meter_live")

    def judge(step_s, *, written=True, **extra_us):
        def replicate(rounds, turn, model, seed):
            off = 1e-6 * (seed % 2)  # so that there is an interval
            told = {(kind, name): 0.0 for kind in live.KINDS for name in live.NAMES[1:]}
            told |= {tuple(key.split("__")): us * 1e-6 for key, us in extra_us.items()}
            found = {(kind, name.replace("_", " ")): value + off for (kind, name), value in told.items()}
            return live.Replicate(steps=dict.fromkeys(live.KINDS, step_s), extra=found, written=written)

        monkeypatch.setattr(live, "take_turns", replicate)
        monkeypatch.setattr(live, "origin_of", lambda root: "machine: this one")
        monkeypatch.setattr("sys.argv", ["meter_live.py", "--replicates", "4"])
        return live.main(), capsys.readouterr().out

    return judge


@pytest.mark.parametrize(
    ("step_s", "extra_us", "broken"),
    [
        (0.01, {"times__wrapped": 98.0, "cpu_times__wrapped": 98.0}, []),
        (0.01, {"cpu_times__wrapped": 99.5}, ["CPU time"]),
        (0.01, {"times__wrapped": 99.5}, ["wall time"]),
        (0.01, {"times__wrapped": 500.0, "cpu_times__wrapped": 500.0}, ["wall time", "CPU time"]),
        (0.01, {"times__alone_again": 500.0, "cpu_times__alone_again": 500.0}, []),
        (0.4, {"times__wrapped": 1900.0, "cpu_times__wrapped": 1900.0}, []),
        (0.4, {"times__wrapped": 2000.0}, ["wall time"]),
    ],
)
def test_the_upper_end_of_the_wrapped_process_is_judged(judged, step_s, extra_us, broken):
    """On the wall as on its CPUs, and no other process: 100 µs, or 0.5 % of a longer step."""
    code, said = judged(step_s, **extra_us)
    assert code == bool(broken)
    verdict = said.splitlines()[-1]
    assert ("NOT HELD" in verdict) == bool(broken)
    assert [kind for kind in ("wall time", "CPU time") if kind in verdict] == broken


def test_a_process_that_left_no_run_has_held_nothing(judged):
    """What it would have cost to write one is not in its steps."""
    code, said = judged(0.01, written=False)
    assert (code, "every run written: False" in said) == (1, True)

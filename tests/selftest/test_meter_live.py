"""A meter is judged by the upper end of the interval of on against off: on the wall and on its CPUs."""

import pytest


@pytest.fixture
def judged(program, monkeypatch, capsys):
    """A function that has four replicates found with these differences, in µs, of a step; gives the exit code and what
    was printed."""
    live = program("meter_live")

    def judge(step_s, *, written=True, **extra_us):
        def replicate(rounds, turn, model, seed):
            off = 1e-6 * (seed % 2)  # so that there is an interval
            found = {(kind, *pair): off for kind in live.KINDS for pair in live.DIFFERENCES}
            for key, us in extra_us.items():
                kind, *pair = key.split("__")
                found[kind, *(name.replace("_", " ") for name in pair)] += us * 1e-6
            return live.Replicate(
                steps=dict.fromkeys(live.KINDS, step_s),
                extra=found,
                telling=dict.fromkeys(live.KINDS, 0.0),
                written=written,
            )

        monkeypatch.setattr(live, "take_turns", replicate)
        monkeypatch.setattr(live, "origin_of", lambda root: "machine: this one")
        monkeypatch.setattr("sys.argv", ["meter_live.py", "--replicates", "4"])
        return live.main(), capsys.readouterr().out

    return judge


@pytest.mark.parametrize(
    ("step_s", "extra_us", "broken"),
    [
        (0.01, {"wall__on__off_twice": 98.0, "CPU__on__off_twice": 98.0}, []),
        (0.01, {"CPU__on__off_twice": 99.5}, ["CPU time"]),
        (0.01, {"wall__on__off_twice": 99.5}, ["wall time"]),
        (0.01, {"wall__on__off_twice": 500.0, "CPU__on__off_twice": 500.0}, ["wall time", "CPU time"]),
        (0.01, {"wall__off_again__off": 500.0, "CPU__off_again__off": 500.0}, []),
        (0.4, {"wall__on__off_twice": 1900.0, "CPU__on__off_twice": 1900.0}, []),
        (0.4, {"wall__on__off_twice": 2000.0}, ["wall time"]),
        (0.01, {"wall__on__alone": 98.0, "CPU__on__alone": 98.0}, []),
        (0.01, {"wall__on__alone": 99.5}, ["wall time"]),
    ],
)
def test_the_meter_is_judged_by_what_it_may_cost_at_most(judged, step_s, extra_us, broken):
    """On the wall as on its CPUs, against the same process and against another: 100 µs, or 0.5 % of a longer step."""
    code, said = judged(step_s, **extra_us)
    assert code == bool(broken)
    verdict = said.splitlines()[-1]
    assert ("NOT HELD" in verdict) == bool(broken)
    assert [kind for kind in ("wall time", "CPU time") if kind in verdict] == broken


def test_a_process_that_left_no_run_has_held_nothing(judged):
    """What it would have cost to write one is not in its steps."""
    code, said = judged(0.01, written=False)
    assert (code, "every run written: False" in said) == (1, True)

"""Forty tries of two scripts: what is taken over, what is promised, and what a try that calls a difference is."""

import dataclasses
import json

import pytest

HERE, ELSEWHERE = "machine: this one, 2 CPUs; commit aaaa", "machine: another, 64 CPUs; commit aaaa"
LATER = "machine: this one, 2 CPUs; commit bbbb"


@pytest.fixture
def live(program):
    return program("attach_live")


@pytest.fixture
def make(live):
    """A function that makes a try of a kind: one that called nothing, unless it is told otherwise."""

    def made(part="identical", number=0, **changes):
        plain = live.Try(
            part=part, number=number, verdict="equivalent", verdicts={"step_time_s": "equivalent"}, ratio=1.0, low=0.99,
            high=1.01, control="equivalent", interleaving="lockstep", exit_code=0, notices=(), occupancy=0.9,
            seconds=1.0, origin=HERE,
        )  # fmt: skip
        return dataclasses.replace(plain, **changes)

    return made


SLOWER = {"verdict": "regressed", "verdicts": {"step_time_s": "regressed"}, "exit_code": 1}


def forty(make, part, called):
    """Forty tries of a kind, of which so many call the candidate slower."""
    return [make(part, number, **(SLOWER if number < called else {})) for number in range(40)]


@pytest.mark.parametrize(
    ("changes", "alarmed"),
    [
        ({}, False),
        ({"exit_code": 3, "verdict": "inconclusive", "verdicts": {"step_time_s": "inconclusive"}}, False),
        ({"exit_code": 1}, True),
        ({"exit_code": 4}, True),
        ({"verdicts": {"step_time_s": "equivalent", "host_peak_train_bytes": "improved"}}, True),
        ({"verdicts": {"step_time_s": "equivalent", "host_peak_train_bytes": "regressed"}}, True),
    ],
)
def test_whatever_calls_a_difference_is_an_alarm(make, changes, alarmed):
    """Either way, of anything that was judged; so is a run that came out as invalid, and not one that left it open."""
    assert make(**changes).alarmed is alarmed


@pytest.mark.parametrize(
    ("part", "called", "broken"),
    [
        ("identical", 5, ""),
        ("identical", 6, "identical: 6 of 40 call a difference"),
        ("loaded", 5, ""),
        ("loaded", 6, "loaded: 6 of 40 call a difference"),
        ("planted", 36, ""),
        ("planted", 35, "planted: found in 35 of 40, promised 36 of 40"),
        ("planted-loaded", 0, ""),
    ],
)
def test_what_is_promised_of_forty(live, make, part, called, broken):
    """Nothing of a planted effect beside load, which is counted."""
    found = live.broken_promises(forty(make, part, called), [part], 40)
    assert (found == []) if not broken else (len(found) == 1 and found[0].startswith(broken))


@pytest.mark.parametrize("part", ["identical", "loaded", "planted", "planted-loaded"])
def test_a_try_that_was_not_made_is_a_promise_that_was_not_kept(live, make, part):
    """However the others came out."""
    called = 40 if part.startswith("planted") else 0
    assert live.broken_promises(forty(make, part, called)[1:], [part], 40) == [f"{part}: 39 of 40 tries were made"]


def test_what_is_planted_is_what_pieces_are_of_a_step(live, make):
    """By what remains of a step without any; what was not measured is not said."""
    assert live.say_planted(make("empty", ratio=0.05)) == (
        "95.0% of a step are pieces, so 3.80% of a step is planted"
    )  # fmt: skip
    assert "was not measured" in live.say_planted(None)
    assert "was not measured" in live.say_planted(make("empty", ratio=None))


@pytest.fixture
def started(live, make, monkeypatch, tmp_path):
    """A function that calls the program with two tries of two kinds, of which each takes no time; gives its exit code
    and which tries were made."""
    made = []

    def attempt(part, number, folder, origin):
        assert (folder / "attach_script.py").is_file()
        made.append((part, number))
        return make(part, number, origin=origin, **(SLOWER if part == "planted" else {}), ratio=0.1)

    def start(*words, origin=HERE):
        made.clear()
        monkeypatch.setattr(live, "attempt", attempt)
        monkeypatch.setattr(live, "origin_of", lambda root: origin)
        keep = ["--keep", str(tmp_path / "kept.jsonl"), "--tries", "2", "--part", "identical", "planted"]
        monkeypatch.setattr("sys.argv", ["attach_live.py", *keep, *words])
        return live.main(), list(made)

    return start


ALL = [("empty", 0), ("identical", 0), ("planted", 0), ("identical", 1), ("planted", 1)]


def test_what_was_stopped_goes_on_where_it_was(started, tmp_path, capsys):
    """What is kept of this machine is not made again, also at another commit, which is printed; half a line is none."""
    assert started() == (0, ALL)
    kept = tmp_path / "kept.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:3]) + lines[3][: lines[3].index("}") + 1])
    capsys.readouterr()
    assert started(origin=LATER) == (0, ALL[3:])
    told = capsys.readouterr().out
    assert "tries: 3 at commit aaaa, 2 at commit bbbb" in told
    assert "90.0% of a step are pieces, so 3.60% of a step is planted" in told
    assert "planted: found in 2 of 2: 2 regressed; least 90% to 90% of a CPU" in told
    assert "every promise was kept" in told
    assert started(origin=LATER) == (0, [])


def test_tries_of_another_machine_are_left_out(started, tmp_path):
    """They stay in the file, and count for nothing here."""
    assert started(origin=ELSEWHERE) == (0, ALL)
    assert started() == (0, ALL)
    origins = [json.loads(line)["origin"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert origins == [ELSEWHERE] * 5 + [HERE] * 5


def test_a_call_that_runs_out_of_time_has_not_kept_its_word(started, capsys):
    """It begins no try after that."""
    assert started("--minutes", "0") == (1, [])
    assert "identical: 0 of 2 tries were made" in capsys.readouterr().out

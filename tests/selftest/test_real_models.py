"""The judge of what is promised of real models, by planted figures, and what it reads of a run."""

import dataclasses

import pytest

from harness.records import store
from harness.records.spending import Spending
from harness.stats import compare_trials


@pytest.fixture
def real(program):
    return program("real_models")


@pytest.fixture
def found(real):
    return real.Found(
        limit_s=480.0,
        wall_s=492.0,
        round_s=30.0,
        share=0.62,
        replicates=5,
        half_widths={"a": 0.02, "b": 0.049},
        shared={"a": 0.03, "b": 0.08},
        valid=True,
    )


def test_what_holds_holds(real, found):
    """Late within a tenth, or within a round where that is longer."""
    assert real.judge(found) == []
    assert real.judge(dataclasses.replace(found, wall_s=525.0)) == []
    assert real.judge(dataclasses.replace(found, wall_s=570.0, round_s=100.0)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wall_s": 530.0}, "8 min 50 s of 8 min 00 s, and 48 s more are allowed"),
        ({"replicates": 4}, "4 replicates, and 5 are promised"),
        ({"share": 0.59}, "59.0 % of the time were measurement, and 60 % are promised"),
        ({"half_widths": {"a": 0.051}}, "training of a: an interval of ± 5.1 %, and ± 5 % are promised"),
        ({"half_widths": {"a": None}}, "training of a: no interval, and ± 5 % are promised"),
        ({"valid": False}, "the run is invalid"),
    ],
)
def test_each_promise_that_does_not_hold_is_said(real, found, changes, said):
    """And nothing else."""
    assert real.judge(dataclasses.replace(found, **changes)) == [said]


def test_the_wider_side_of_an_interval_counts(real):
    """As a share of the ratio; one replicate has none."""
    base = [[1.0, 1.01], [1.0, 1.0], [1.02, 1.0]]
    ratio = compare_trials(base, [[2.0, 2.1], [2.0, 2.0], [2.1, 2.0]], pairing="replicate")
    assert real.half_width(ratio) == pytest.approx(max(ratio.high / ratio.ratio, ratio.ratio / ratio.low) - 1)
    assert real.half_width(compare_trials(base[:1], base[:1], pairing="replicate")) is None


def test_what_a_run_says_of_itself_is_read(real, write_run):
    """Its time, its replicates, both kinds of interval, and whether it counts."""
    path = write_run("a", {"plain": [0.1, 0.101, 0.1], "nf4": [0.12, 0.121, 0.12]})
    run = store.read_run(str(path), path.parent)
    with pytest.raises(SystemExit, match="does not say what its time went to"):
        real.find(run)
    spending = Spending(wall_s=90.0, limit_s=100.0, measured_s={"steps": 60.0})
    found = real.find(dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, spending=spending)))
    assert (found.wall_s, found.limit_s, found.replicates, found.valid) == (90.0, 100.0, 3, True)
    assert found.share == pytest.approx(60 / 90)
    assert found.round_s == pytest.approx(3 * (0.1 + 0.12 + 0.1))
    assert found.half_widths.keys() == found.shared.keys() == {"nf4"}
    assert 0 < found.half_widths["nf4"] <= found.shared["nf4"]
    (late, share, alone, together) = real.say(found)
    assert (late, share) == ("1 min 30 s of 1 min 40 s, 3 replicates", "66.7 % of the time were measurement")
    assert alone == f"95 % intervals of training: nf4 ± {100 * found.half_widths['nf4']:.1f} %"
    assert together.startswith("as the report decides, for all variants together: nf4 ± ")


def test_a_model_that_is_not_there_is_skipped_with_the_reason(real, monkeypatch, capsys):
    """And fails nothing."""
    monkeypatch.delenv(real.GEMMA, raising=False)
    assert real.main(["--only", "gemma3"]) == 0
    assert "skipped: $LORAMETER_GEMMA names no GGUF file" in capsys.readouterr().out

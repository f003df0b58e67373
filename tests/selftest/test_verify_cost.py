"""The benchmark of verify against another revision, without its processes."""

import pytest


@pytest.fixture
def cost(program):
    """The program."""
    return program("verify_cost")


@pytest.mark.parametrize(("factor", "status"), [(1.2, 0), (1.49, 0), (1.6, 1)])
def test_an_interval_above_the_bound_is_an_exit_status(cost, monkeypatch, capsys, tmp_path, factor, status):
    """Revisions take turns, first the one, then the other; the ratio is that of a turn."""
    asked = []

    def in_process(code, run, layers):
        asked.append(code == cost.ROOT)
        slow = factor if code == cost.ROOT else 1.0
        return {"step": 1.0, "profile": slow, "spy": slow}

    monkeypatch.setattr(cost, "checkout", lambda revision, folder: tmp_path)
    monkeypatch.setattr(cost, "in_process", in_process)
    assert cost.main(["--turns", "2"]) == status
    assert asked == [False, True, True, False] * 2
    printed = capsys.readouterr().out
    assert f"nf4, spy: {factor:.3f} [{factor:.3f}, {factor:.3f}]" in printed
    assert ("exceeded" in printed) == bool(status)


def test_noise_widens_the_interval(cost):
    """A geometric mean inside its interval; one turn says nothing."""
    middle, low, high = cost.estimate([1.0, 2.0, 1.5, 1.2, 1.7, 1.1])
    assert low < middle < high
    assert middle == pytest.approx((1.0 * 2.0 * 1.5 * 1.2 * 1.7 * 1.1) ** (1 / 6))
    assert cost.estimate([3.0]) == (pytest.approx(3.0), 0.0, float("inf"))


def test_a_revision_that_git_does_not_know_is_refused(cost, tmp_path):
    """With git's own words."""
    with pytest.raises(RuntimeError, match="git archive no-such-revision"):
        cost.checkout("no-such-revision", tmp_path)


def test_a_process_that_fails_is_told(cost, tmp_path):
    """With the end of what it said."""
    (tmp_path / "kernels_check.py").write_text("raise ImportError('nothing here')")
    with pytest.raises(RuntimeError, match="nothing here"):
        cost.in_process(tmp_path, "bfloat16", 1)

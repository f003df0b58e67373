"""The coverage program, in small."""

import numpy as np
import pytest

DRAWS = 1000


def test_coverage_is_near_its_level(program):
    """Each kind of noise is covered within its bounds, widened by three times the error of few draws."""
    coverage = program("coverage")
    slack = 3 * (0.05 * 0.95 / DRAWS) ** 0.5
    for noise in coverage.NOISES:
        share = coverage.covered(noise, 6, DRAWS)
        assert noise.least - slack <= share <= noise.most + slack, noise.name


def test_noise_without_a_shared_seed_differs(program):
    """Each kind of noise has the shape asked for, differs between its sides, and is the same for the same seed."""
    coverage = program("coverage")
    for noise in coverage.NOISES:
        base, candidate = noise.simulate(np.random.default_rng(1), 7, 5)
        assert base.shape[:2] == candidate.shape[:2] == (7, 5)
        assert not np.allclose(base, candidate)
        again, _ = noise.simulate(np.random.default_rng(1), 7, 5)
        assert np.array_equal(base, again)


def test_drift_is_shared_by_the_sides(program):
    """Drift moves both sides of a replicate: unpaired it is most of the scatter, paired nearly nothing of it."""
    base, candidate = program("coverage").drift(np.random.default_rng(2), 200, 8)
    assert (candidate - base).mean(axis=2).std() < base.mean(axis=2).std() / 3


@pytest.mark.parametrize("one_reference", [False, True])
def test_family_keeps_its_rate(program, one_reference):
    """Ten null comparisons raise any alarm in about 5 % of families at most."""
    assert program("coverage").family_alarms(5, 400, one_reference=one_reference) <= 0.083


def test_broken_bound_is_an_exit_status(program, monkeypatch, capsys):
    """A share outside its bounds gives exit 1 and a reason with noise, size and numbers; inside gives 0."""
    coverage = program("coverage")
    good = coverage.Cell("Gaussian, paired", 5, 0.95, 0.94, 0.96, 100)
    bad = coverage.Cell("Gaussian, paired", 6, 0.93, 0.94, 0.96, 100)
    monkeypatch.setattr(coverage, "measure", lambda draws: iter([good, bad]))
    assert coverage.main([]) == 1
    printed = capsys.readouterr().out
    assert "does not hold: Gaussian, paired, 6 replicates: 93.00% of 100 runs, not within 94.00% to 96.00%" in printed
    monkeypatch.setattr(coverage, "measure", lambda draws: iter([good]))
    assert coverage.main([]) == 0
    assert "holds: every bound" in capsys.readouterr().out


def test_all_cells_are_measured(program):
    """Every noise is simulated at 5 to 12 replicates, and both kinds of family at both ends."""
    cells = list(program("coverage").measure(4))
    assert {cell.size for cell in cells if cell.row == "Gaussian, paired"} == set(range(5, 13))
    assert len(cells) == 5 * 8 + 2 * 2
    assert all(0 <= cell.share <= 1 for cell in cells)

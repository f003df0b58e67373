"""What a meter leaves in a process is counted, and judged by the upper end of its interval."""

import pytest

PROFILE = """\
version: 1
events: Ir Dr Dw I1mr D1mr D1mw ILmr DLmr DLmw
fn=(1) ceval
16 100 40 20 3 5 2 1 4 2
totals: 422 133 62 9 6 1 3 82 23
"""


@pytest.fixture
def pages(program, monkeypatch):
    """The program, on a machine that has valgrind."""
    pages = program("meter_pages")
    monkeypatch.setattr(pages, "origin_of", lambda root: "machine: this one")
    monkeypatch.setattr(pages.shutil, "which", lambda name: name)
    return pages


def test_counts_are_the_totals_of_callgrinds_file(pages):
    """Instructions, and the pages that neither level had."""
    assert pages.counts_of(PROFILE) == (422, 82 + 23)


@pytest.mark.parametrize("profile", ["", PROFILE.partition("totals")[0]])
def test_nothing_counted_is_an_error(pages, profile):
    """A run that was not counted is no run without misses."""
    with pytest.raises(ValueError, match="counted nothing"):
        pages.counts_of(profile)


@pytest.mark.parametrize(
    ("instructions", "missed", "broken"),
    [(1005, 1050, []), (1020, 1000, ["instructions"]), (1000, 1058, ["pages missed"]), (1020, 1080, None)],
)
def test_more_than_the_limit_is_not_held(pages, monkeypatch, capsys, instructions, missed, broken):
    """One replicate has three in a thousand more than the other, so that the upper end is what counts."""
    monkeypatch.setattr(
        pages, "replicate", lambda seed: ((10_000, 10_000), (instructions * 10, missed * 10 + 30 * (seed % 2)))
    )
    monkeypatch.setattr("sys.argv", ["meter_pages.py", "--replicates", "4"])
    broken = ["instructions", "pages missed"] if broken is None else broken
    assert pages.main() == bool(broken)
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.endswith(f"NOT HELD: {', '.join(broken)}" if broken else ": held")


def test_without_valgrind_nothing_is_said_of_pages(pages, monkeypatch):
    """What was not counted is unknown."""
    monkeypatch.setattr(pages.shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["meter_pages.py"])
    with pytest.raises(SystemExit, match="nothing was counted"):
        pages.main()

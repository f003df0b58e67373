"""What goes, and what never does."""

import json

import msgspec
import pytest

from harness import cli
from harness.commands.documents_of_many import PrunedOf
from harness.errors import UsageError
from harness.records import codec, store
from harness.records.document import write_document
from harness.records.locks import alone
from harness.results.prune import choose, parse_age, remove
from harness.verdicts.baselines import accept

DAY_S = 86400.0


@pytest.fixture
def runs(write_run):
    """Five runs of one study, a day apart, the first the oldest, and one of another study."""
    for day in range(5):
        dated(write_run(f"run{day}", {"plain": [1.0, 1.1, 1.2], "nf4": [1.0, 1.1, 1.2]}), day)
    path = dated(write_run("other", {"plain": [1.0, 1.1], "nf4": [1.0, 1.2]}), 0)
    rewritten(path, study=codec.to_json(store.read_manifest(path).study) | {"name": "other"})
    return path.parent


def dated(path, day):
    return rewritten(path, created_unix_s=day * DAY_S)


def rewritten(path, **changes):
    write_document(path / "manifest.json", codec.to_json(store.read_manifest(path)) | changes)
    return path


def names(candidates):
    return [one.run for one in candidates]


def test_the_newest_of_each_study_stay(runs):
    """By when they began, whatever their names are."""
    choice = choose(runs, keep=2, now_unix_s=9 * DAY_S)
    assert names(choice.going) == ["run0", "run1", "run2"]
    assert choice.kept == 3
    assert names(choose(runs, keep=0).going) == ["run0", "other", "run1", "run2", "run3", "run4"]


def test_only_older_ones_go(runs):
    """Alone, and beside a number to keep."""
    assert names(choose(runs, older_s=6.5 * DAY_S, now_unix_s=9 * DAY_S).going) == ["run0", "other", "run1", "run2"]
    assert names(choose(runs, keep=1, older_s=6.5 * DAY_S, now_unix_s=9 * DAY_S).going) == ["run0", "run1", "run2"]


def test_an_accepted_baseline_never_goes(runs):
    """It is said instead."""
    accept("run0", runs)
    choice = choose(runs, keep=1)
    assert "run0" not in names(choice.going)
    assert [(one.run, one.why) for one in choice.staying] == [("run0", "it is an accepted baseline")]
    (runs / "baselines.json").write_text("{")
    with pytest.raises(UsageError, match="baselines"):
        choose(runs, keep=1)


def test_a_run_under_way_never_goes(runs):
    """Not before it is looked at, and not after."""
    rewritten(runs / "run0", status="running")
    with alone(runs / "run0" / store.TRIALS, ""):
        assert names(choose(runs, keep=1).staying) == ["run0"]
    choice = choose(runs, keep=1)
    assert "run0" in names(choice.going)
    with alone(runs / "run0" / store.TRIALS, ""):
        gone, refused = remove(choice.going)
    assert names(refused) == ["run0"]
    assert "run0" not in names(gone)
    assert (runs / "run0" / "manifest.json").is_file()


def test_what_nobody_can_read_stays(runs):
    """Nobody knows what it is."""
    (runs / "run1" / "manifest.json").write_text("{")
    choice = choose(runs, keep=0)
    assert names(choice.staying) == ["run1"]
    assert "cannot be read" in choice.staying[0].why


def test_a_link_to_a_run_elsewhere_stays(runs, tmp_path):
    """What it leads to is not of this folder."""
    (runs / "run0").rename(tmp_path / "elsewhere")
    (runs / "run0").symlink_to(tmp_path / "elsewhere")
    choice = choose(runs, keep=0)
    assert names(choice.staying) == ["run0"]


def test_what_goes_is_gone_and_nothing_else(runs):
    """Its size is what its files held."""
    size = sum(file.stat().st_size for file in (runs / "run0").rglob("*") if file.is_file())
    gone, refused = remove(choose(runs, keep=3).going)
    assert (names(gone), refused) == (["run0", "run1"], ())
    assert gone[0].size_bytes == size
    assert sorted(path.name for path in store.list_runs(runs)) == ["other", "run2", "run3", "run4"]
    assert not (runs / "run0").exists()


@pytest.mark.parametrize(("text", "seconds"), [("12h", 43200), ("30d", 30 * DAY_S), (" 8w ", 56 * DAY_S)])
def test_ages(text, seconds):
    """Hours, days and weeks."""
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "3", "3m", "-1d", "1.5d", "9999999d", "3d 4h"])
def test_what_is_no_age_is_refused(text):
    """Before anything is looked at."""
    with pytest.raises(UsageError, match="--older"):
        parse_age(text)


@pytest.fixture
def called(runs, capsys):
    """The command; gives exit code, standard output and standard error."""

    def run(*words):
        code = cli.main(["prune", *words, "--runs-dir", str(runs)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_command_says_what_goes_and_a_dry_run_removes_nothing(called, runs):
    """The same lines, in other words."""
    accept("run1", runs)
    code, out, _ = called("--keep", "2", "--dry-run")
    assert code == 0
    beginnings = [" ".join(line.split()[:3]) for line in out.splitlines()]
    assert beginnings[:3] == ["would go run0", "would go run2", "stays run1 it"]
    assert beginnings[3].startswith("2 runs,")
    assert len(store.list_runs(runs)) == 6
    code, out, _ = called("--keep", "2", "--json")
    document = json.loads(out)
    assert not msgspec.convert(document, PrunedOf).dry_run
    assert [one["run"] for one in document["removed"]] == ["run0", "run2"]
    assert document["removed"][0]["size_bytes"] > 0
    assert [one["run"] for one in document["kept_for_a_reason"]] == ["run1"]
    assert len(store.list_runs(runs)) == 4


@pytest.mark.parametrize("words", [(), ("--keep", "-1"), ("--older", "soon")])
def test_what_says_nothing_removes_nothing(words, called, runs):
    """Exit code 2."""
    code, out, err = called(*words)
    assert (code, out) == (2, "")
    assert "lorameter:" in err
    assert len(store.list_runs(runs)) == 6

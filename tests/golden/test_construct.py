"""The constructed runs themselves: they are what construct.py writes, and small."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def constructed(tmp_path):
    import runpy

    runpy.run_path(str(HERE / "construct.py"))["construct"](tmp_path)
    return tmp_path


def texts(folder):
    names = ("runs", "damaged", "files", "profiles")
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for name in names
        for path in (folder / name).rglob("*")
        if path.is_file()
    }


def test_the_constructed_files_are_those_of_the_script(constructed):
    """Nobody mended one by hand."""
    found, kept = texts(constructed), texts(HERE)
    assert sorted(found) == sorted(kept)
    assert [name for name in kept if kept[name] != found[name]] == []


def test_the_files_stay_small():
    """All of this folder is below 4 MB, so that a checkout does not carry it about."""
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file() and path.suffix != ".pyc") < 4e6

"""Tests of packed runs that were damaged or made by another program: they are refused with an error."""

import random
import shutil

import pytest

from lorameter.errors import UsageError
from lorameter.records import store
from lorameter.records.packed import unpacked, write_packed
from tests.constructed import RUNS

RUN = RUNS / "sound"


def test_damaged_bytes_are_refused(tmp_path):
    """The damage may be in the archive's names, its sizes or the compressed data."""
    path = tmp_path / "run.lorameter.zip"
    write_packed(path, RUN)
    whole, chance, refused = path.read_bytes(), random.Random(1), 0
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 2, 8))):
            damaged[chance.randrange(len(damaged))] ^= chance.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            with unpacked(path) as folder:
                assert (folder / "manifest.json").is_file()
        except UsageError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("member", "text", "said"),
    [
        ("manifest.json", '{"schema": null}', "manifest.json: schema None"),
        ("trials.jsonl", "{}\n", "trials.jsonl: schema None"),
    ],
    ids=["manifest", "record"],
)
def test_a_fault_inside_is_reported_with_the_file(tmp_path, member, text, said):
    """The message names the file and not the folder of its unpacked content; a run's directory gives the same error."""
    folder = shutil.copytree(RUN, tmp_path / "plain")
    (folder / member).write_text(text)
    write_packed(tmp_path / "run.lorameter.zip", folder)
    with pytest.raises(UsageError) as refused:
        store.read_run(str(tmp_path / "run.lorameter.zip"), tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/run.lorameter.zip: {said}")
    with pytest.raises(UsageError, match=said):
        store.read_run("plain", tmp_path)

"""A packed run that was damaged on its way, or was packed by another, is refused and ends nothing."""

import random
import shutil
import zipfile

import pytest

from lorameter.errors import UsageError
from lorameter.records import bounded_io, store
from lorameter.records.packed import MEMBERS, UNPACKED_FREELY_BYTES, unpacked, write_packed
from tests.constructed import RUNS

RUN = RUNS / "sound"


def test_damaged_bytes_are_refused(tmp_path):
    """Wherever they are: in the names of the archive, in its sizes, or in what is compressed."""
    path = tmp_path / "run.lorameter.zip"
    write_packed(path, RUN)
    whole, chance, refused = path.read_bytes(), random.Random(1), 0
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 2, 8))):
            damaged[chance.randrange(len(damaged))] ^= chance.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            with unpacked(path) as folder:
                assert (folder / "manifest.json").is_file()
        except UsageError:
            refused += 1
    assert refused > 80


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_another_compression_is_refused(tmp_path, method):
    """What `lorameter pack` never writes fails in words of its own when it is damaged."""
    path = tmp_path / "run.lorameter.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.write(RUN / "manifest.json", "manifest.json")
    with pytest.raises(UsageError, match=r"manifest\.json is compressed as no packed run is"), unpacked(path):
        pass


@pytest.mark.parametrize("name", MEMBERS)
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, name):
    """A few kilobytes of newlines: a thousand times as much would lie on the disk, and be read line by line."""
    path = tmp_path / "run.lorameter.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for member in {"manifest.json", name}:
            archive.writestr(member, b"{}" if member != name else b"\n" * (UNPACKED_FREELY_BYTES + 1))
    said = rf"run\.lorameter\.zip: {name} unpacks from [\d,]+ bytes to 16,777,217, over 200 times"
    with pytest.raises(UsageError, match=said), unpacked(path):
        pass


BAD = r"cannot be read: more than 9 of its lines are"


@pytest.mark.parametrize(
    ("member", "text", "said"),
    [
        ("manifest.json", '{"schema": null}', "manifest.json: schema None"),
        ("trials.jsonl", "\n" * 20, f"trials.jsonl: {BAD} blank"),
        ("trials.jsonl", "{\n" * 20, f"trials.jsonl: {BAD} damaged"),
    ],
    ids=["manifest", "blank", "damaged"],
)
def test_what_is_wrong_inside_is_said_of_the_file(tmp_path, monkeypatch, member, text, said):
    """Not of the folder that it was unpacked into, which nobody knows; a run's directory is refused alike."""
    monkeypatch.setattr(bounded_io, "MOST_BLANK_LINES", 9)
    monkeypatch.setattr(bounded_io, "MOST_DAMAGED_LINES", 9)
    folder = shutil.copytree(RUN, tmp_path / "plain")
    (folder / member).write_text(text)
    write_packed(tmp_path / "run.lorameter.zip", folder)
    with pytest.raises(UsageError) as refused:
        store.read_run(str(tmp_path / "run.lorameter.zip"), tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/run.lorameter.zip: {said}")
    with pytest.raises(UsageError, match=said):
        store.read_run("plain", tmp_path)

"""A packed run that was damaged on its way, or was packed by another, is refused and ends nothing."""

import random
import zipfile
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.records.packed import unpacked, write_packed

RUN = Path(__file__).parents[1] / "golden" / "runs" / "sound"


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

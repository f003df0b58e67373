"""Tests that model names are resolved without torch and network."""

import dataclasses
import socket
from pathlib import Path

import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue
from lorameter.models.catalogue import CATALOGUE


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
        assert not probe("somebody/some-model/resolve/main/config.json")
        server.setblocking(False)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_directory_without_a_configuration_is_no_model(tmp_path):
    """A model directory must have a config.json."""
    with pytest.raises(UsageError, match=r"no config\.json"):
        catalogue.resolve(str(tmp_path))

"""The catalogue: what a model name stands for, resolved without torch and without a network."""

import dataclasses
import socket
from pathlib import Path

import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue
from lorameter.models.catalogue import CATALOGUE


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """No test sees or touches the user's cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LORAMETER_CACHE", str(cache))
    return cache


def test_cache_directory_precedence(monkeypatch):
    """LORAMETER_CACHE goes before XDG_CACHE_HOME, and that before ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/users/someone")
    monkeypatch.setenv("LORAMETER_CACHE", "/own")
    assert catalogue.cache_dir() == Path("/own")
    monkeypatch.delenv("LORAMETER_CACHE")
    assert catalogue.cache_dir() == Path("/xdg/lorameter")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert catalogue.cache_dir() == Path("/users/someone/.cache/lorameter")


def test_tiny_llama_is_random_and_of_bytes():
    """The default model needs no prefix to be random, and no file but the packaged one."""
    source = catalogue.resolve("tiny-llama")
    assert (source.kind, source.random, source.tokenizer) == ("config", True, "byte")
    prefixed = catalogue.resolve("random:tiny-llama")
    assert dataclasses.replace(prefixed, label=source.label) == source


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("llama2-7b", "NousResearch/Llama-2-7b-hf"),
        ("llama2-70b", "NousResearch/Llama-2-70b-hf"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("gemma-2b", "google/gemma-2b"),
    ],
)
def test_hub_models_of_the_catalogue(name, hub_id):
    """llama2-7b means the ungated mirror's weights, others their owner's; `random:` keeps the id for the tokenizer."""
    source = catalogue.resolve(name)
    assert (source.kind, source.location, source.random) == ("hub", hub_id, False)
    assert catalogue.resolve(f"random:{name}").location == source.location


def test_unfetched_model_says_how_to_fetch_it():
    """A catalogue model that is not in the cache is refused with the command that puts it there."""
    with pytest.raises(UsageError, match="lorameter model fetch smollm2-135m"):
        catalogue.resolve("smollm2-135m")


def test_fetched_model_is_a_directory(empty_cache):
    """Once fetched, a model and its random twin both come from the cache."""
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
        ("random:smollm-135m", "Did you mean smollm2-135m"),
        ("zzz", "The catalogue has tiny-llama, smollm2-135m, llama2-7b"),
        ("", "no catalogue name"),
        ("random:", "no catalogue name"),
        ("./nowhere", "does not exist"),
        ("nowhere/model.gguf", "does not exist"),
        ("a/b/c", "no catalogue name"),
    ],
)
def test_unknown_names_are_refused(name, expected):
    """A name that stands for nothing is quoted, with near matches or what there is."""
    with pytest.raises(UsageError, match=expected) as caught:
        catalogue.resolve(name)
    assert repr(name) in str(caught.value)


def test_hub_id_resolves_without_asking_the_hub(monkeypatch):
    """owner/name is a hub id; resolving it is free."""
    monkeypatch.setattr(catalogue, "hub_answers", lambda file: pytest.fail("asked the hub"))
    source = catalogue.resolve("random:someone/Some.Model-1")
    assert (source.kind, source.location, source.random) == ("hub", "someone/Some.Model-1", True)


def test_a_silent_hub_costs_one_timeout(monkeypatch):
    """A hub that accepts and never answers counts as unreachable, after one timeout and no retries."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(catalogue, "HUB_TIMEOUT_S", 0.2)
    probe = catalogue.hub_answers.__wrapped__  # without the answer that the process remembers
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not probe("somebody/some-model/resolve/main/config.json")
        server.setblocking(False)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()


def test_offline_mode_asks_nobody(monkeypatch):
    """HF_HUB_OFFLINE means that not even the probe goes out."""
    constants, utils = (pytest.importorskip(f"huggingface_hub.{name}") for name in ("constants", "utils"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(utils, "get_session", lambda: pytest.fail("asked the hub"))
    assert not catalogue.hub_answers.__wrapped__("somebody/some-model/resolve/main/config.json")


def test_a_directory_without_a_configuration_is_no_model(tmp_path):
    """A directory must hold a config.json to be named as a model."""
    with pytest.raises(UsageError, match=r"no config\.json"):
        catalogue.resolve(str(tmp_path))


def test_a_folder_that_was_removed_holds_no_model(tmp_path, monkeypatch):
    """One may still stand in it."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UsageError, match=r"model = '\.'"):
        catalogue.resolve(".")

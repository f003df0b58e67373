"""Tests that headers of GGUF files are read as the gguf package writes them."""

from __future__ import annotations

import struct

import numpy
import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.shapes import ModelShape, gguf_of

gguf = pytest.importorskip("gguf")


NO_FILES = {
    "empty": b"",
    "another kind": b"PAR1" * 8,
    "another version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "more values than bytes": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
    "more tensors than bytes": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
}


@pytest.mark.parametrize("content", NO_FILES.values(), ids=NO_FILES)
def test_a_file_that_is_no_gguf_is_refused(tmp_path, content):
    """No memory is allocated for the counts in a bad header."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a readable GGUF file"):
        shapes.shape(catalogue.resolve(f"random:{path}"))


def test_a_header_and_the_shape_that_it_describes(tmp_path):
    """The reader skips lists, uses transformers' model type, takes a missing output tensor as a tied head, and refuses
    a truncated file."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_token_list(["a", "b", "c"])
    writer.add_array("rows", [[1, 2], [3]])
    sizes = {
        "embedding_length": 128, "feed_forward_length": 192, "block_count": 3, "attention.head_count": 4,
        "attention.head_count_kv": 2, "context_length": 512,
    }  # fmt: skip
    for name, size in sizes.items():
        writer.add_uint32(f"gemma3.{name}", size)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", numpy.zeros((300, 128), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = {f"gemma3.{name}": size for name, size in sizes.items()}
    expected |= {"general.architecture": "gemma3", "tokenizer.chat_template": "{{ messages }}"}
    assert gguf_of(path).values == expected
    assert shapes.shape(catalogue.resolve(f"random:{path}")) == ModelShape(
        hidden_size=128, intermediate_size=192, layers=3, heads=4, kv_heads=2, head_dim=32, vocab_size=300, context=512,
        tied=True, architecture="gemma3_text",
    )  # fmt: skip
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(UsageError, match="truncated"):
        gguf_of(path)


def test_a_missing_gguf_package_is_reported_with_the_install_command(tmp_path, monkeypatch):
    """The error comes before any process starts that would load the file."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lorameter\[gguf\]'"):
        shapes.shape(catalogue.resolve(f"random:{tmp_path / 'model.gguf'}"))

"""Headers of GGUF files are read as the package gguf writes them."""

from __future__ import annotations

import struct

import numpy
import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.shapes import read_header
from lorameter.records.fileio import NotReadableError

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
    """Nothing is allocated for the counts that it claims."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a readable GGUF file"):
        shapes.shape(catalogue.resolve(f"random:{path}"))


def test_values_and_tensors_are_read_and_lists_are_skipped(tmp_path):
    """All types that a value can have, and what follows a list; a truncated file is refused."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b", "c"])
    writer.add_int64("i64", -(2**40))
    writer.add_float32("f32", 0.5)
    writer.add_bool("yes", True)
    writer.add_array("rows", [[1, 2], [3]])
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", numpy.zeros((300, 128), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_header(path)
    assert found.values == {
        "general.architecture": "llama", "i64": -(2**40), "f32": 0.5, "yes": True,
        "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    assert dict(found.tensors) == {"token_embd.weight": (128, 300)}
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(NotReadableError, match="truncated"):
        read_header(path)


def test_without_the_package_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    """Before anything is started that would load the file."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lorameter\[gguf\]'"):
        shapes.shape(catalogue.resolve(f"random:{tmp_path / 'model.gguf'}"))

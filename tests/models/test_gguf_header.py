"""The header of a GGUF file, as the package gguf writes it, and damaged."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest

from lorameter.errors import UsageError
from lorameter.models import catalogue, shapes
from lorameter.models.shapes import read_header
from lorameter.records.fileio import NotReadableError

gguf = pytest.importorskip("gguf")


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def value(name, kind, content):
    return text(name) + struct.pack("<I", kind) + content


def listed(kind, count, content=b""):
    return struct.pack("<IQ", kind, count) + content


def header(*values, tensors=0, count=None, version=3):
    about = value("general.architecture", 8, text("llama"))
    count = len(values) + 1 if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + about + b"".join(values)


def tensor(*dimensions, name="t", kind=0, offset=0):
    sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return text(name) + struct.pack("<I", len(dimensions)) + sizes + struct.pack("<IQ", kind, offset)


NO_FILES = {
    "nothing": b"",
    "another kind": b"PAR1" * 8,
    "another version": header(version=99),
    "values without end": header(count=1 << 60),
    "tensors without end": header(tensors=1 << 60),
    "a list beyond the file": header(value("a", 9, listed(4, 1000)), value("b", 0, b"\1")),
    "a value of no type": header(value("a", 77, b"\0" * 8)),
    "a tensor cut short": header(tensors=1) + tensor(64, 64),
    "a tensor of no type": header(tensors=1) + tensor(1, kind=99) + b"\0" * 64,
}


@pytest.mark.parametrize("content", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_such_file_is_refused_at_once(tmp_path, content):
    """Whatever it says of its sizes, nothing is made of them."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(NotReadableError):
        read_header(path)
    with pytest.raises(UsageError, match="not a readable GGUF file"):
        shapes.shape(catalogue.resolve(f"random:{path}"))


def test_values_are_read_and_lists_passed_over(tmp_path):
    """All types that a value can have; what stands behind a list is found."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b", "c"])
    writer.add_uint8("u8", 200)
    writer.add_int64("i64", -(2**40))
    writer.add_float32("f32", 0.5)
    writer.add_bool("yes", True)
    writer.add_array("rows", [[1, 2], [3]])
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    assert read_header(path).values == {
        "general.architecture": "llama", "u8": 200, "i64": -(2**40), "f32": 0.5, "yes": True,
        "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip


def test_tensors_are_found_and_a_truncated_file_is_refused(tmp_path):
    """Dimensions are those of the package that wrote the file."""
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_tensor("token_embd.weight", numpy.zeros((300, 128), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_header(path)
    assert (dict(found.tensors), found.values["llama.block_count"]) == ({"token_embd.weight": (128, 300)}, 3)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(NotReadableError, match="truncated"):
        read_header(path)


def test_without_the_package_the_remedy_is_said(tmp_path, monkeypatch):
    """Before anything is started that would load the file."""
    (tmp_path / "model.gguf").write_bytes(header())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lorameter\[gguf\]'"):
        shapes.shape(catalogue.resolve(f"random:{tmp_path / 'model.gguf'}"))


def test_a_dry_run_reads_the_header_once(gguf_file, tmp_path):
    """Walking over a vocabulary takes tenths of a second, and a forecast asks for the shape of each pair of trials."""
    study = 'title = "t"\n[workload]\nsequence_length = 32\nprompt_tokens = 8\nnew_tokens = 4\n'
    study += "".join(f'[[variant]]\nname = "r{r}"\nr = {r}\n' for r in (2, 4, 8))
    (tmp_path / "study.toml").write_text(study)
    code = (
        "import sys\n"
        "from lorameter.cli import main\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, told: event == 'open' and opened.append(str(told[0])))\n"
        f"code = main(['run', 'study.toml', '--model', {str(gguf_file)!r}, '--dry-run'])\n"
        f"print('OPENED', code, opened.count({str(gguf_file)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "OPENED 0 1" in done.stdout

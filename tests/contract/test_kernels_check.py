"""Tests of `python -m kernels_check`: the content of a recording, and the fast paths of this machine."""

import pytest

from tests.contract import doors
from tests.contract.expected import check_document, check_shape, check_text, parse


@pytest.mark.parametrize("file", ["trace.json", "trace.csv"])
def test_trace(file, kernels_check):
    """The output has backends, 4-bit paths and shares of time, as text and as a document."""
    text, document = kernels_check(f"trace {file}"), kernels_check(f"trace {file} --json")
    assert (text.code, document.code) == (0, 0)
    check_text(f"kernels_check/{file}.txt", text.out)
    check_document(f"kernels_check/{file}", parse(document.out))


@pytest.mark.parametrize("line", [
    "no-such-command", "trace", "trace a b", "trace absent.json", "trace strict.toml", "rules", "probe --fast",
])  # fmt: skip
def test_refusals(line, kernels_check):
    """A bad call exits with 2, with the reason on standard error and nothing on standard output."""
    outcome = kernels_check(line)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err


def test_probe():
    """The document has an entry for each fast path, whether it ran, and the evidence."""
    outcome = doors.start("python", "-m", "kernels_check", "probe", "--json", CXX="/no/compiler")  # skip compilation
    document = parse(outcome.out)
    assert document["machine"].pop("versions")["torch"]
    check_shape("kernels_check/probe", document)
    paths = {path["name"]: path for path in document["paths"]}
    assert paths["SDPA math"]["status"] == paths["NF4"]["status"] == "ran"
    assert paths["compile"]["status"] == "unavailable"
    assert outcome.code == 0

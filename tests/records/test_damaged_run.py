"""Runs whose files were damaged: `lorameter report` reads what is left or refuses it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorameter.cli import main


@pytest.fixture
def run(write_run):
    """A run of two variants and its files with their bytes."""
    path = write_run("damaged", {"plain": [0.1, 0.101, 0.1], "nf4": [0.12, 0.121, 0.12]})
    return path, {file: file.read_bytes() for file in path.iterdir() if file.is_file()}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_run_is_read_or_refused(run, capsys, data):
    """Bytes are cut out of a file, changed or inserted: no exit code but those for a report and for bad input."""
    path, files = run
    for file, content in files.items():
        file.write_bytes(content)
    file = data.draw(st.sampled_from(sorted(files)))
    content = files[file]
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(start + 20, len(content))) | st.just(len(content)))
    file.write_bytes(content[:start] + data.draw(st.binary(max_size=8)) + content[end:])
    assert main(["report", str(path)]) in (0, 2, 3, 4)
    assert not any(ord(one) < 32 and one != "\n" for one in "".join(capsys.readouterr()))

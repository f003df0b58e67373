"""Tests of the interpreter of a measuring process, with real processes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import kernels_check
import lorameter
from lorameter.errors import InvalidRunError, UsageError
from lorameter.machine.provenance import (
    differing_packages,
)
from lorameter.records.record import SCHEMA
from lorameter.run.workers.environment import Host, describe, inspect
from lorameter.run.workers.local import LocalExecutor


@pytest.mark.parametrize("program", ["/bin/false", "/bin/echo", "/no/such/python"])
def test_a_program_other_than_python_is_refused(program):
    """The error names the program and its output, whether it fails, prints something else or does not exist."""
    with pytest.raises(UsageError, match=program):
        inspect(Host(python=program))


def test_a_package_installed_from_a_commit_is_identified_by_it(tmp_path):
    """Two commits of one version differ."""
    for name, commit in (("one", "a" * 40), ("two", "b" * 40)):
        folder = tmp_path / name / "widget-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: Widget\nVersion: 1.0\n")
        source = {"url": "https://example.org/widget", "vcs_info": {"vcs": "git", "commit_id": commit}}
        (folder / "direct_url.json").write_text(json.dumps(source))
    one, two = (describe(Host(path=(str(tmp_path / name),))) for name in ("one", "two"))
    assert differing_packages(one, two) == {"widget": ("1.0 (commit aaaaaaaaaaaa)", "1.0 (commit bbbbbbbbbbbb)")}


def copy_of_the_packages(folder):
    """Return a copy of the packages that can be changed like another revision."""
    for package in (lorameter, kernels_check):
        subprocess.run(["cp", "-r", str(Path(package.__file__).parent), str(folder)], check=True)
    return folder


@pytest.mark.faults
def test_a_side_with_another_schema_is_refused_by_name(tmp_path):
    """The error comes before the measurement, since the records could not be read."""
    other = copy_of_the_packages(tmp_path)
    record = other / "lorameter" / "records" / "record.py"
    record.write_text(record.read_text().replace(f"\nSCHEMA = {SCHEMA}\n", f"\nSCHEMA = {SCHEMA + 1}\n"))
    host = Host(path=(str(other),), cwd=str(other))
    executor = LocalExecutor(host=host, label="candidate")
    executor.start(tmp_path, 1)
    try:
        with pytest.raises(
            InvalidRunError, match=f"worker of 'candidate' speaks schema {SCHEMA + 1}, this program {SCHEMA}"
        ):
            executor.hello()
    finally:
        executor.close()


def test_a_host_that_cannot_import_is_an_error_that_names_side_and_interpreter(tmp_path):
    """The message is the worker's last line, with the log of that side."""
    broken = tmp_path / "path" / "transformers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken on purpose')")
    host = Host(path=(str(broken.parent),))
    executor = LocalExecutor(host=host, label="base")
    executor.start(tmp_path, 1)
    with pytest.raises(InvalidRunError, match=r"worker of 'base' did not start: .*broken on purpose.*zygote-base\.log"):
        executor.hello()

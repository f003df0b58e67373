"""Both ends of the supported versions: environments are made once, for what they are called; else nothing passes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

UV = """#!/bin/sh
# Makes environments that hold an interpreter in name only, and installs nothing.
echo "$@" >> {folder}/log
case "$1" in
venv) for last; do :; done; mkdir -p "$last/bin" && touch "$last/bin/python" ;;
pip) test ! -e {folder}/broken || {{ echo "error: no such version" >&2; exit 1; }} ;;
esac
"""


def program_at(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def bounds(program):
    return program("bounds")


@pytest.fixture
def fake(bounds, tmp_path, monkeypatch):
    """A Python 3.12 on the path, and a uv that writes down what it is asked; a file `broken` makes it fail."""
    monkeypatch.setattr(bounds, "UV", (str(program_at(tmp_path / "uv", UV.format(folder=tmp_path))),))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "no-manager"))
    (tmp_path / "pyproject.toml").write_text("[project]")
    return program_at(tmp_path / "bin" / "python3.12", "#!/bin/sh\necho 3.12\n")


def lower(bounds):
    return next(bound for bound in bounds.BOUNDS if bound.name == "lower")


def test_an_environment_is_made_once_and_again_when_dependencies_change(bounds, fake, tmp_path):
    """With exactly the versions of its end, beside the project's own and what tests need."""
    python = bounds.environment(lower(bounds), tmp_path / "made", tmp_path)
    assert python == tmp_path / "made" / "lower" / "bin" / "python"

    def asked():
        return (tmp_path / "log").read_text().splitlines()

    made, installed = asked()
    assert f"--python {fake} " in made
    assert installed.endswith(f"-e {tmp_path}[dev] torch==2.11.0 transformers==5.17.* scikit-learn pandas pyarrow")
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "pyproject.toml", tmp_path / "other")
    bounds.environment(
        lower(bounds), tmp_path / "made", tmp_path / "other"
    )  # of another checkout: only that is laid in
    assert asked()[2:] == [f"pip install --quiet --python {python} --no-deps -e {tmp_path / 'other'}"]
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = []")
    bounds.environment(lower(bounds), tmp_path / "made", tmp_path)
    assert len(asked()) == 5


def test_what_cannot_be_made_is_said_and_tried_again(bounds, fake, tmp_path):
    """A failed installation leaves nothing that a later call would take for an environment."""
    (tmp_path / "broken").touch()
    for _ in range(2):
        assert bounds.environment(lower(bounds), tmp_path / "made", tmp_path) == (
            "its environment cannot be made: error: no such version"
        )
    (tmp_path / "broken").unlink()
    assert not isinstance(bounds.environment(lower(bounds), tmp_path / "made", tmp_path), str)


def test_an_interpreter_must_be_the_version_that_it_is_called(bounds, fake, tmp_path, monkeypatch):
    """A name on the path that runs another one, or nothing, is none; a version manager's is taken then."""
    assert bounds.interpreter("3.12") == str(fake)
    fake.write_text("#!/bin/sh\nexit 127\n")
    assert bounds.interpreter("3.12") is None
    managed = program_at(tmp_path / "manager" / "versions" / "3.12.1" / "bin" / "python", "#!/bin/sh\necho 3.12\n")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "manager"))
    assert bounds.interpreter("3.12") == str(managed)
    assert bounds.interpreter("") == sys._base_executable


def test_without_an_interpreter_nothing_is_run_and_nothing_passes(bounds, fake, tmp_path):
    """The reason stands in the report."""
    fake.unlink()
    bound = lower(bounds)
    found = bounds.attempt(bound, bounds.runs(bound, sliced=True), tmp_path / "made", tmp_path)
    assert (found.good, found.reason) == (False, "no Python 3.12 on this machine: name one on the path python3.12")


def test_another_environment_than_it_is_called_is_not_tested(bounds):
    """The probe tells by the libraries themselves: here it holds at that end only."""
    here = sys.version_info[:2] == (3, 12) and version("torch").startswith("2.11.")
    asked = subprocess.run([sys.executable, "-c", lower(bounds).probe], capture_output=True, text=True, check=False)
    assert (asked.returncode == 0) is (here and version("transformers").startswith("5.17."))
    assert asked.returncode == 0 or "Error" in asked.stderr


def test_the_slice_is_of_tests_that_exist(bounds):
    """A file that has moved would be left out without a word."""
    assert all((bounds.ROOT / name).exists() for name in bounds.SLICE)

"""Tests of the sides of an A/B with real git repositories and environments: the kind of side that an argument names,
and that exactly this side is measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import site
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lorameter
from lorameter.errors import UsageError, redact
from lorameter.machine.provenance import differing_packages, harness_identity
from lorameter.run.workers.environment import (
    describe,
    inspect,
    parse_requirements,
    restore_spec,
)
from lorameter.run.workers.local import LocalExecutor
from lorameter.run.workers.sides import DECLARED, OWN_PACKAGES, name_side, open_side

OLD_PACKAGING = "packaging==24.2"
"""A pure, small package that is older than any version that lorameter's dependencies need."""


def silent(line):
    """Discard a line of a report."""


def git(folder, *arguments):
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run(host, code):
    """Return what a process of this host prints."""
    command = [host.python, "-c", code]
    done = subprocess.run(
        command, env=host.variables({"PATH": "/usr/bin:/bin"}), cwd=host.cwd, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """Two commits of a package `gadget` other than lorameter; the second is tagged, and the tree has another change."""
    folder = tmp_path / "repository"
    (folder / "gadget").mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    for value in (1, 2):
        (folder / "gadget" / "__init__.py").write_text(f"VALUE = {value}\n")
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", str(value))
    git(folder, "tag", "v2")
    (folder / "gadget" / "__init__.py").write_text("VALUE = 3\n")
    return folder


@pytest.fixture
def opened(repository, tmp_path):
    """A function that opens sides of that repository."""

    @contextlib.contextmanager
    def open_named(name, **changes):
        options = {"repository": repository, "cache": tmp_path / "cache", "report": silent} | changes
        side = name_side(name, options["repository"])
        with open_side(side, **options) as host:
            yield SimpleNamespace(host=host, kind=side.kind, label=side.label, declared=DECLARED[side.kind])

    return open_named


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for all tests of this module that install."""
    return tmp_path_factory.mktemp("cache")


# --- revisions --------------------------------------------------------------------------------------------------------


def test_a_revision_is_checked_out_and_imported(opened, repository):
    """The side imports the revision's code and not the working tree; its label has the commit, and bytecode does not
    make it dirty."""
    with opened("HEAD~1") as side:
        assert (side.kind, side.declared) == ("revision", ("git",))
        commit = git(repository, "rev-parse", "HEAD~1")
        assert side.label == f"HEAD~1 ({commit[:9]})"
        assert run(side.host, "import gadget; print(gadget.VALUE)") == "1"
        assert list((Path(side.host.cwd) / "gadget").glob("__pycache__/*.pyc"))
        assert describe(side.host)["git"] == {"commit": commit, "dirty": False}
    with opened("v2") as side:
        assert run(side.host, "import gadget; print(gadget.VALUE)") == "2"


def test_a_working_tree_library_missing_in_the_revision_is_refused(opened, repository, monkeypatch):
    """An editable install of a package that the revision lacks is refused: both sides would measure the install."""
    (repository / "new" / "peft").mkdir(parents=True)
    (repository / "new" / "peft" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(repository / "new"))
    with pytest.raises(UsageError, match=r"the revision has no peft .* loads .*new"), opened("HEAD"):
        pass


def test_a_revision_without_a_package_is_refused(opened, repository):
    """A revision without a package is refused, since both sides would be equal."""
    git(repository, "rm", "--quiet", "--force", "-r", "gadget")
    (repository / "README").write_text("moved\n")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "empty")
    with pytest.raises(UsageError, match="nothing of it would be measured"), opened("HEAD"):
        pass
    assert len(git(repository, "worktree", "list").splitlines()) == 1


FINDER = """
import importlib.util, sys
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "gadget":
            return importlib.util.spec_from_file_location(name, {file!r})
"""


@pytest.fixture
def editable(repository, tmp_path):
    """A function that makes an editable install of the repository in an environment and returns its python."""

    def install(pth_lines):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
        folder = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
        (folder / "finder_of_gadget.py").write_text(FINDER.format(file=str(repository / "gadget" / "__init__.py")))
        (folder / "gadget.pth").write_text(pth_lines.format(repository=repository))
        python = tmp_path / "venv" / "bin" / "python"
        check = [str(python), "-c", "import gadget; print(gadget.VALUE)"]
        assert subprocess.run(check, check=True, capture_output=True, text=True, cwd="/").stdout == "3\n"
        return str(python)

    return install


@pytest.mark.parametrize(
    "pth_lines",
    ["{repository}\n", "import sys, finder_of_gadget; sys.meta_path.append(finder_of_gadget.Finder)\n"],
    ids=["path", "hook"],
)
def test_an_editable_install_does_not_override_the_worktree(opened, editable, monkeypatch, pth_lines):
    """The side imports the revision although the environment imports the working tree, for path lines and for appended
    hooks."""
    monkeypatch.setattr(sys, "executable", editable(pth_lines))
    with opened("HEAD~1") as side:
        assert run(side.host, "import gadget; print(gadget.VALUE)") == "1"


def test_an_import_hook_that_takes_precedence_is_refused(opened, editable, repository, monkeypatch):
    """Some build backends insert their hook first; the side would then import the working tree."""
    pth_lines = "import sys, finder_of_gadget; sys.meta_path.insert(0, finder_of_gadget.Finder)\n"
    monkeypatch.setattr(sys, "executable", editable(pth_lines))
    with pytest.raises(UsageError, match=r"gadget would not be measured: an import loads .*repository"), opened("HEAD"):
        pass
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.selftest
def test_a_revision_of_lorameter_is_measured_by_its_own_harness(tmp_path):
    """The worker of another revision of lorameter imports that revision, whether lorameter is installed editable or
    not."""
    here = Path(lorameter.__file__).parents[2]
    if not (here / ".git").exists():
        pytest.skip("not a git checkout")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--no-checkout", "--shared", str(here), str(clone))
    folders = ("harness", "kernels_check")
    for folder in folders:  # the current working tree, so that the schema agrees
        subprocess.run(["cp", "-r", str(here / folder), str(clone)], check=True)
    with (clone / "harness" / "lorameter" / "__init__.py").open("a") as file:
        file.write("CHANGED = True\n")
    git(clone, "add", *folders)
    git(clone, "commit", "--quiet", "--message", "another harness")
    with open_side(name_side("HEAD", clone), repository=clone, cache=tmp_path, report=silent) as host:
        tree = Path(host.cwd)
        origins = inspect(host, OWN_PACKAGES).origins
        assert {name: Path(origin) for name, origin in origins.items()} == {
            "lorameter": tree / "harness" / "lorameter" / "__init__.py",
            "kernels_check": tree / "kernels_check" / "__init__.py",
        }
        executor = LocalExecutor(host=host, label="base")
        executor.start(tmp_path, 1)
        try:
            hello = executor.hello()
        finally:
            executor.close()
        identity = run(host, "from lorameter.machine.provenance import harness_identity; print(harness_identity())")
    assert hello.harness == identity != harness_identity()


# --- interpreters -----------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path):
    """A function that makes an empty environment; `packages` adds those of the current one, without editable
    installs."""

    def make(*, packages):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "other")], check=True)
        if packages:
            folder = next((tmp_path / "other" / "lib").glob("python*/site-packages"))
            (folder / "present.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        return str(tmp_path / "other" / "bin" / "python")

    return make


def test_an_interpreter_is_given_the_present_harness(opened, environment):
    """The interpreter has the libraries but no lorameter; its symlink is kept, since it marks a virtual environment."""
    python = environment(packages=True)
    with opened(python) as side:
        assert (side.kind, side.declared, side.label) == (
            "interpreter",
            ("python", "libraries", "cuda", "kernels"),
            python,
        )
        assert side.host.python == python
        origins = inspect(side.host, OWN_PACKAGES).origins
        for package in OWN_PACKAGES:
            assert Path(origins[package]).parent == Path(side.host.path[0]) / package
        assert run(side.host, "import sys, lorameter.records.record; print(sys.prefix)") == str(Path(python).parents[1])
        folder = Path(side.host.path[0])
    assert not folder.exists()
    assert Path(lorameter.__file__).is_file()


def test_an_interpreter_without_the_libraries_is_refused(opened, environment):
    """The error lists all missing libraries and the command that installs them."""
    python = environment(packages=False)
    remedy = rf"without torch, transformers, peft, bitsandbytes.*{python} -m pip install torch transformers peft bits"
    with pytest.raises(UsageError, match=remedy), opened(python):
        pass


def test_a_name_is_a_python_on_path_unless_it_is_a_revision(repository, tmp_path, monkeypatch):
    """python3.99 on PATH is an interpreter; a branch of that name takes precedence over it, and a path over both."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3.99").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert name_side("python3.99", repository).kind == "interpreter"
    git(repository, "branch", "python3.99")
    assert name_side("python3.99", repository).kind == "revision"
    assert name_side(str(tmp_path / "bin" / "python3.99"), repository).kind == "interpreter"


# --- requirements -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "requirements"),
    [
        ("peft==0.20.0", ("peft==0.20.0",)),
        ("torch==2.12.* peft == 0.20.0", ("peft==0.20.0", "torch==2.12.*")),
        ("peft >= 0.19, < 0.21 accelerate~=1.10", ("accelerate~=1.10", "peft<0.21,>=0.19")),
        ("peft @ https://example.org/peft.whl", ("peft@ https://example.org/peft.whl",)),
        ("transformers[torch]>=5", ("transformers[torch]>=5",)),
        ("flash-attn", ("flash-attn",)),
        ("mian", None),
        ("peft==0.20.0 featur-x", None),
        ("--index-url=https://example.org", None),
        ("./wheel.whl", None),
        ("", None),
    ],
)
def test_requirements_are_read_from_one_line(text, requirements):
    """Spaces separate requirements or surround their operators; a bare name is a requirement only if it is a known
    package."""
    found = parse_requirements(text)
    normalised = found and tuple(requirement.replace("@ ", "@").replace(" @", "@") for requirement in found)
    assert normalised == (requirements and tuple(one.replace("@ ", "@") for one in requirements))


def test_requirements_take_precedence_over_installed_packages(index, opened, cache):
    """The installed requirement replaces a package and its metadata; everything else comes from the current
    environment, which is unchanged."""
    present = importlib.metadata.version("packaging")
    with opened(OLD_PACKAGING, cache=cache) as side:
        assert (side.kind, side.declared, side.label) == (
            "requirements",
            ("libraries", "cuda", "kernels"),
            OLD_PACKAGING,
        )
        code = "import importlib.metadata as m, packaging, sys; print(m.version('packaging'), packaging.__version__)"
        assert run(side.host, code) == "24.2 24.2"
        base, candidate = describe(side.host), {"packages": {}}
        with opened(sys.executable) as other:
            candidate = describe(other.host)
        assert differing_packages(base, candidate) == {"packaging": ("24.2", present)}
        assert run(side.host, "import lorameter; print(lorameter.__file__)")
    check = [sys.executable, "-c", "import importlib.metadata as m; print(m.version('packaging'))"]
    assert subprocess.run(check, capture_output=True, text=True, check=True).stdout.strip() == present


def test_a_resumed_ab_installs_requirements_without_their_credential():
    """A URL is used without its user and password, which pip's settings can supply; requirements with another redacted
    part are refused, and `***` is never sent."""
    redacted = redact("peft @ https://me:hunter2@host/peft.whl")
    assert restore_spec("run r, base", redacted) == "peft @ https://host/peft.whl"
    for url in ("https://host/peft.whl?sig=hunter2", f"https://host/hf_{'a' * 20}/peft.whl"):
        with pytest.raises(UsageError, match=r"run r, base: .*\*\*\*.* Measure a new A/B"):
            restore_spec("run r, base", redact(f"peft @ {url}"))


def test_a_failed_install_is_an_error_and_leaves_nothing(opened, tmp_path):
    """The message has pip's last lines, and the next attempt starts from scratch."""
    with (
        pytest.raises(UsageError, match=r"packaging==0\.0\.0\.1.*No matching distribution"),
        opened("packaging==0.0.0.1"),
    ):
        pass
    assert [path.suffix for path in (tmp_path / "cache" / "environments").iterdir()] == [".lock"]


@pytest.mark.parametrize("spec", ["no-such-branch", "/no/such/python", "  ", "--force"])
def test_an_unknown_side_is_refused_with_the_reason_for_each_kind(opened, spec):
    """The error has the reason for each kind (interpreter, revision, requirements) and the valid forms."""
    with pytest.raises(UsageError, match=r"Name a git revision .* or requirements"), opened(spec):
        pass

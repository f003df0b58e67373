"""The tests at both ends of what the project runs on: the oldest libraries that it takes, and the newest there are.

    python benchmarks/selftest/bounds.py [--only NAME] [--slice] [--keep FILE] [--environments DIR]

`lower` is what images of GPU machines hold: Python 3.12, torch 2.11 built for CUDA (without a card here), transformers
5.17, and beside them scikit-learn, pandas and pyarrow, which transformers imports where it finds them. `newest` is
this interpreter with everything brought up to date, and the same three. Whether an environment is what it is called is
asked of its libraries before its tests run; where it is not, they are not run, and it does not pass.

Environments are made once, in DIR, and again when the project's dependencies change. ``--slice`` runs the tests that a
bound has ever broken, and those that start real processes, in minutes instead of an hour. As in `portable.py`, which
runs and counts the tests, what was found on the same files is taken over from ``--keep``.

Exit status 1 unless the tests of every bound were run and passed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from portable import Found, Kept, Setting, hash_of_files, report, try_setting
from reading import machine_line

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv" / "bounds"
UV = (sys.executable, "-m", "uv")
"""Makes an environment of some gigabytes in a fraction of pip's time."""
BESIDE = ("scikit-learn", "pandas", "pyarrow")
"""What transformers imports where it is installed, with threads of its own."""
SLICE = (
    "tests/models/costs",
    "tests/kernels_check/judges/test_execution.py",
    "tests/kernels_check/trace/test_report.py",
    "tests/kernels_check/probe/test_probe.py",
    "tests/trial/test_zygote.py",
    "tests/run/executors/test_local.py",
    "tests/profile/test_measure.py",
    "tests/machine",
    "tests/gpu",
)
"""Tests that a bound has broken, of what it does otherwise, and of a real trial there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One end: an interpreter, what is installed into it, and how one sees that it is there."""

    name: str
    python: str
    """Version; "" for that of the interpreter that runs this."""
    requirements: tuple[str, ...]
    newest: bool
    """Whether everything is brought up to date, also what is held elsewhere."""
    probe: str
    """Python that ends with an AssertionError where the environment is another."""


BOUNDS = (
    Bound(
        name="lower",
        python="3.12",
        requirements=("torch==2.11.0", "transformers==5.17.*", *BESIDE),
        newest=False,
        probe="import sys, torch, transformers, sklearn, pandas, pyarrow\n"
        "assert sys.version_info[:2] == (3, 12), sys.version\n"
        "assert torch.__version__.startswith('2.11.') and torch.version.cuda, torch.__version__\n"
        "assert transformers.__version__.startswith('5.17.'), transformers.__version__",
    ),
    Bound(
        name="newest",
        python="",
        requirements=BESIDE,
        newest=True,
        probe="import torch, transformers, sklearn, pandas, pyarrow",
    ),
)


def interpreter(version: str) -> str | None:
    """An interpreter of a version: this one's own, on the path, or of a version manager; None where none runs."""
    if not version:
        return str(getattr(sys, "_base_executable", sys.executable))
    manager = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{version}")
    found = [*([on_path] if on_path else []), *map(str, sorted(manager.glob(f"{version}.*/bin/python"), reverse=True))]
    told = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in found:
        asked = subprocess.run([path, "-c", told], capture_output=True, text=True, check=False)
        if asked.returncode == 0 and asked.stdout.strip() == version:
            return path
    return None


def environment(bound: Bound, folder: Path, root: Path) -> Path | str:
    """The interpreter of a bound's environment, made where it is not there yet; a text says why it cannot be made."""
    folder = folder.resolve()
    python = folder / bound.name / "bin" / "python"
    stamp = folder / bound.name / "made-of"
    made_of = hashlib.sha256((root / "pyproject.toml").read_bytes() + repr(bound).encode()).hexdigest()
    ours = [*UV, "pip", "install", "--quiet", "--python", str(python), "--no-deps", "-e", str(root)]
    if stamp.exists() and stamp.read_text() == made_of:
        return python if (fault := _fault(ours)) is None else fault  # it may have been made for another checkout
    own = interpreter(bound.python)
    if own is None:
        return f"no Python {bound.python} on this machine: name one on the path python{bound.python}"
    shutil.rmtree(folder / bound.name, ignore_errors=True)
    newest = ("--upgrade",) if bound.newest else ()
    for words in (
        [*UV, "venv", "--quiet", "--python", own, str(folder / bound.name)],
        [*UV, "pip", "install", "--quiet", "--python", str(python), *newest, "-e", f"{root}[dev]", *bound.requirements],
    ):
        if (fault := _fault(words)) is not None:
            return fault
    stamp.write_text(made_of)
    return python


def _fault(words: Sequence[str]) -> str | None:
    """Why an installer's command failed; None where it did not."""
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if not done.returncode:
        return None
    return f"its environment cannot be made: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}"


def runs(bound: Bound, *, sliced: bool) -> Setting:
    """The tests of a bound, as `portable` runs and reports them."""
    tests = SLICE if sliced else ("tests/",)
    return Setting(name=f"{bound.name}, slice" if sliced else bound.name, tests=tests, probe=bound.probe)


def attempt(bound: Bound, setting: Setting, folder: Path, root: Path) -> Found:
    """Make the environment of a bound, and run its tests there."""
    python = environment(bound, folder, root)
    return Found(reason=python) if isinstance(python, str) else try_setting(setting, root, python=str(python))


def versions(bound: Bound, folder: Path) -> str:
    """What an environment holds, in a line."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "scikit-learn", "pandas", "pyarrow")
    told = (
        "import platform, importlib.metadata as m; "
        f"print('Python', platform.python_version(), *(f', {{n}} {{m.version(n)}}' for n in {names}), sep='', end='')"
    )
    python = folder / bound.name / "bin" / "python"
    if not python.exists():
        return f"{bound.name}: no environment"
    asked = subprocess.run([str(python), "-c", told], capture_output=True, text=True, check=False)
    return f"{bound.name}: {asked.stdout or asked.stderr.strip().splitlines()[-1]}"


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are not kept, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", choices=[one.name for one in BOUNDS])
    parser.add_argument("--slice", action="store_true", help="the tests that a bound has broken, in minutes")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where runs are kept, and taken from")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, metavar="DIR")
    options = parser.parse_args(arguments)
    chosen = [one for one in BOUNDS if not options.only or one.name in options.only]
    files = hash_of_files(ROOT)
    kept = Kept(options.keep, files)
    print(machine_line(), flush=True)
    settings = [runs(bound, sliced=options.slice) for bound in chosen]
    for bound, setting in zip(chosen, settings, strict=True):
        if (setting.name, 1) in kept.found:
            continue
        found = attempt(bound, setting, options.environments, ROOT)
        if hash_of_files(ROOT) != files:
            raise SystemExit("files have changed while the tests ran: this run says nothing of either state")
        kept.add(setting.name, 1, found)
    print(*(versions(bound, options.environments) for bound in chosen), sep="\n")
    return report(kept, settings)


if __name__ == "__main__":
    sys.exit(main())

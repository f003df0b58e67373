"""Break one rule or one comparison of kernels_check at a time: does a test fail?

    python benchmarks/selftest/mutation.py [--jobs 2] [--only attention] [--list] [--keep FILE]

A check that no test depends on can be wrong without anybody noticing. Three kinds of mutants are made:

- a rule of ``kernel_rules.json`` is dropped, one at a time;
- a rule is moved in front of an earlier one, for each pair of which a known name matches both, so that order matters;
- in the modules that judge, a comparison is negated or its bound moved, ``and`` and ``or`` are exchanged, a ``not`` is
  dropped.

Nothing is changed in place: each job has a copy of the package and its tests in a temporary folder. A first pass over
the tests notes which function each test enters; a mutant is given to the tests that enter its function up to the first
failure, first those that have noticed another one nearby, then the module's own. Libraries are imported once, in the
process that forks a child a mutant, and what is not changed is compiled once.

It takes hours. With ``--keep`` each verdict is written as it falls, and a later call with the same file goes on where
an earlier one was stopped: only what was found on the same package, to the byte, is taken over, and of that what no
change of a test can have made otherwise.

Exit status 1 if a mutant survives that is not listed in EQUIVALENT with its reason.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import ast
import gc
import hashlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mutants import JUDGES, RULES, Mutant, all_mutants

ROOT = Path(__file__).parents[2]
PACKAGE, TESTS = "kernels_check", "tests/kernels_check"
DECIDE = "_decides.py"
"""How the files end that judge constructed evidence: quick, and the first to notice."""
ELSEWHERE = ("probe/*", "test_selftest.py", "trace/*")
"""Tests of the probe, of the self-test and of how recordings are read: nothing that is changed here is theirs."""
WATCHED = (TESTS, *(f"--ignore-glob=*/{name}" for name in ELSEWHERE))
FAILURE = "first_failure.txt"
ONLY = (*(Path(module).name for module in JUDGES), Path(RULES).stem)
"""Names of what ``--only`` chooses."""
FOR_EQUIVALENTS = 60
"""Tests that a mutant known as equivalent is given; it would survive all of them, which takes the longest."""
FIRST = 20
"""Tests that a mutant is given before the rest of them are so much as collected."""
LIKELIEST = 60
"""Tests that every mutant is given before those that live on are given all: of a survivor that takes minutes."""
LIVES = "lives"
PER_TEST_S = 60
"""A test that takes longer hangs, by which a mutant is noticed too; tests take a few seconds at most."""
PER_MUTANT_S = 1800
"""After which a mutant is taken to hang where no test can be ended: all tests together take less."""
EQUIVALENT: dict[str, str] = {
    "activity.common: some[first][1] < others[second][1] -> some[first][1] <= others[second][1]": (
        "of two intervals that end together either may be left behind: what follows begins no sooner"
    ),
    "attention._layers_astray: call.backend == 'eager' -> call.backend != 'eager'": (
        "only the number of different answers is read"
    ),
    "mixing._masks: places < (size + 1) // 2 -> places >= (size + 1) // 2": (
        "each half is asked, the other one first: one that sees the other is enough"
    ),
    "mixing._masks: size > 1 -> size >= 1": "a single position has none beside it: the module is called in vain",
    "mixing.mixes: main.dim() > 2 -> main.dim() >= 2": "of two dimensions the second is the last: it is asked twice",
    "padding._leading_runs: broken < start -> broken <= start": (
        "the token that begins a record breaks no run, so that the two places are never the same"
    ),
}
"""Mutants that change nothing that can be observed, by their key, each with the reason."""


@dataclass(slots=True)
class Coverage:
    """What the first pass over the tests found."""

    seconds: dict[str, float] = field(default_factory=dict)
    entered: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Tests by ``module.function``."""
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one mutant."""

    word: str
    """``killed``, ``survived``, ``hung`` or ``untested``; ``lives`` until all its tests have been asked."""
    by: str = ""
    """The test that failed first."""
    test_hash: str = ""
    """Of the file of that test."""


class Kept:
    """Verdicts and the first pass of earlier calls on the same package, in a file that is added to.

    A mutant that was killed stays so as long as the test that did it is there, whatever tests have come since. All else
    is found anew where any test has changed.
    """

    def __init__(self, file: Path | None, folder: Path) -> None:
        self._file = file
        self._folder = folder
        settings = [*(folder / TESTS).rglob("conftest.py"), *(folder / PACKAGE).rglob("*")]
        self._package = _hash_of(folder, settings)
        self._tests = _hash_of(folder, (folder / TESTS).rglob("*"))
        self.coverage: dict[str, Any] | None = None
        self.verdicts: dict[str, Verdict] = {}
        self.seconds = 0.0
        """Of the calls before."""
        whole = file.read_text().rpartition("\n")[0] if file is not None and file.exists() else ""
        if file is not None and whole:
            file.write_text(whole + "\n")  # without a line that an end by force has left half
        for entry in map(json.loads, whole.splitlines()):
            if entry.pop("package") == self._package:
                self._take(entry, same=entry.pop("tests") == self._tests)

    def _take(self, entry: dict[str, Any], *, same: bool) -> None:
        self.seconds += entry.get("seconds", 0.0)
        if same:
            self.coverage = entry.get("coverage", self.coverage)
        for key, told in entry.get("verdicts", {}).items():
            verdict = Verdict(**told)
            if same or (verdict.word == "killed" and verdict.test_hash == self.hash_of_test(verdict.by)):
                self.verdicts[key] = verdict

    def hash_of_test(self, test: str) -> str:
        """Of the file that a test lies in; empty where there is none."""
        file = self._folder / test.partition("::")[0]
        return _hash_of(self._folder, [file]) if test and file.is_file() else ""

    def add(self, **entry: Any) -> None:
        """Write what was found; whole, or nothing of it."""
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps({"package": self._package, "tests": self._tests, **entry}) + "\n")


def _hash_of(folder: Path, files: Iterable[Path]) -> str:
    hashed = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file() and "__pycache__" not in path.parts):
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return hashed.hexdigest()


class FirstFailure:
    """Notes which test failed first, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The call of a test, or what it needs, has ended."""
        if report.failed and not self._file.exists():
            self._file.write_text(report.nodeid)


class Recorder:
    """Notes which functions of the judges each test enters, and how long it takes."""

    def __init__(self, package: Path) -> None:
        self.coverage = Coverage()
        self._files = {str(package / f"{module}.py"): Path(module).name for module in JUDGES}
        self._files[str(package / "rules.py")] = "rules"
        self._spans = {file: list(_functions(Path(file))) for file in self._files}
        self._test = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Watch one test with its fixtures."""
        self._test = item.nodeid
        begin = time.perf_counter()
        sys.setprofile(self._note)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self.coverage.seconds[item.nodeid] = time.perf_counter() - begin

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that fails unmutated would kill every mutant."""
        if report.failed:
            self.coverage.failed.append(report.nodeid)

    def _note(self, frame: Any, event: str, argument: Any) -> None:
        module = self._files.get(frame.f_code.co_filename)
        if event == "call" and module is not None:
            line = frame.f_code.co_firstlineno
            for name, first, last in self._spans[frame.f_code.co_filename]:
                if first <= line <= last:
                    self.coverage.entered[f"{module}.{name}"].add(self._test)


def _functions(file: Path) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, first, node.end_lineno or node.lineno


def copy_of_the_tree(folder: Path) -> Path:
    """The package, its tests and the settings, without caches."""
    ignored = shutil.ignore_patterns("__pycache__")
    for part in (PACKAGE, TESTS):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def compile_once(folder: Path) -> None:
    """Have everything there compiled, the tests as pytest rewrites them: a mutant is left one file to compile.

    Python and pytest tell by a file's time and size whether what was compiled is its own, so whoever changes a file and
    puts it back has to put back its time, and nothing may be compiled for a mutant.
    """

    def work() -> int:
        sys.dont_write_bytecode = False
        return run_tests(["--collect-only", *WATCHED])

    os.waitpid(in_child(folder, work), 0)


def in_child(folder: Path, work: Callable[[], int]) -> int:
    """Fork; the child imports the package from ``folder`` and does the work in silence. Returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        os.setsid()
        sys.path.insert(0, str(folder))
        output = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
        sys.stdout.flush()
    finally:
        os._exit(code)


def run_tests(arguments: list[str], *plugins: Any) -> int:
    """Run pytest in this process: what only a GPU can run, and the harness's plugin, left out."""
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:lorameter", "-m", "not gpu"]
    options += [f"--timeout={PER_TEST_S}"]
    return int(pytest.main([*options, *arguments], plugins=list(plugins)))


def first_pass(folder: Path, kept: Kept) -> Coverage:
    """Run every test once, unmutated, unless that has been done."""
    found = kept.coverage or _run_first_pass(folder)
    if kept.coverage is None and not found["failed"]:
        kept.add(coverage=found)
    entered = {name: set(tests) for name, tests in found["entered"].items()}
    return Coverage(seconds=found["seconds"], entered=entered, failed=found["failed"])


def _run_first_pass(folder: Path) -> dict[str, Any]:

    def work() -> int:
        recorder = Recorder(folder / PACKAGE)
        code = run_tests([*WATCHED], recorder)
        found = recorder.coverage
        entered = {name: sorted(tests) for name, tests in found.entered.items()}
        result = {"seconds": found.seconds, "entered": entered, "failed": found.failed}
        (folder / "coverage.json").write_text(json.dumps(result))
        return code

    os.waitpid(in_child(folder, work), 0)
    try:
        found: dict[str, Any] = json.loads((folder / "coverage.json").read_text())
    except FileNotFoundError:
        raise SystemExit((folder / "output.txt").read_text()) from None
    return found


def tests_of(mutant: Mutant, coverage: Coverage) -> list[str]:
    """Tests that enter what was changed: those of its own file first, the quick before the slow."""
    own = f"/test_{'rules' if mutant.file == RULES else Path(mutant.file).stem}.py"
    wanted = "rules.classify", "rules.classify_operator"
    asked = (
        set().union(*(coverage.entered.get(name, set()) for name in wanted))
        if mutant.function is None
        else coverage.entered.get(mutant.function, set())
    )
    asked |= {test for test in coverage.seconds if mutant.function is None and own in test}
    first = sorted(asked, key=lambda test: (own not in test and DECIDE not in test, coverage.seconds[test]))
    return first[:FOR_EQUIVALENTS] if mutant.key in EQUIVALENT else first


def survives(tests: list[str], failure: Path) -> int:
    """Give the tests to a mutant, the first few before the others; returns how pytest ended."""
    failure.unlink(missing_ok=True)
    few, others, first = tests[:FIRST], tests[FIRST:], FirstFailure(failure)
    return run_tests(["-x", *few], first) or (run_tests(["-x", *others], first) if others else 0)


class Killers:
    """Tests that have killed a mutant, the latest first: they are the likeliest to notice the next one beside it."""

    def __init__(self, known: Iterable[tuple[str, Verdict]]) -> None:
        self._by: dict[str, list[str]] = defaultdict(list)
        for key, verdict in known:
            self.add(key, verdict.by)

    def add(self, key: str, test: str) -> None:
        """A test has killed a mutant."""
        for place in (_function(key), _function(key).partition(".")[0]) if test else ():
            self._by[place] = [test, *(one for one in self._by[place] if one != test)]

    def first(self, key: str, tests: list[str]) -> list[str]:
        """The tests, those first that killed in the same function, and then in the same module."""
        asked = set(tests)
        own = [one for one in self._by[_function(key)] if one in asked]
        near = [one for one in self._by[_function(key).partition(".")[0]] if one in asked and one not in own][:FIRST]
        return [*own, *near, *(one for one in tests if one not in {*own, *near})]


def _function(key: str) -> str:
    return key.partition(":")[0]


def judge_mutants(mutants: list[Mutant], coverage: Coverage, folders: list[Path], kept: Kept) -> dict[str, Verdict]:
    """Run each mutant in a free folder, those that the likeliest tests leave alive once more by all; by key."""
    first = run_mutants(mutants, coverage, folders, kept, most=LIKELIEST)
    living = [mutant for mutant in mutants if first[mutant.key].word == LIVES]
    print(
        f"{len(living)} live on after the likeliest tests:", *(one.key for one in living), sep="\n  ", file=sys.stderr
    )
    kept.verdicts = {key: verdict for key, verdict in first.items() if verdict.word != LIVES}
    return first | run_mutants(living, coverage, folders, kept)


def run_mutants(
    mutants: list[Mutant], coverage: Coverage, folders: list[Path], kept: Kept, most: int | None = None
) -> dict[str, Verdict]:
    """Run each mutant that has no verdict yet by at most so many tests."""
    verdicts = {mutant.key: kept.verdicts[mutant.key] for mutant in mutants if mutant.key in kept.verdicts}
    killers = Killers(verdicts.items())
    running: dict[int, tuple[Mutant, Path, float]] = {}
    sound: dict[str, tuple[bytes, os.stat_result]] = {}
    alive: dict[str, str] = {}
    free, waiting = list(folders), [mutant for mutant in reversed(mutants) if mutant.key not in verdicts]
    last = time.monotonic()
    gc.freeze()  # what was imported is no garbage, and pytest looks for some at each end
    while waiting or running:
        while waiting and free:
            mutant, folder = waiting.pop(), free.pop()
            every = killers.first(mutant.key, tests_of(mutant, coverage))
            tests = every[:most]
            alive[mutant.key] = LIVES if len(tests) < len(every) else "survived"
            if not tests:
                verdicts[mutant.key] = Verdict(word="untested")
                free.append(folder)
                continue
            file = folder / PACKAGE / mutant.file
            sound[mutant.key] = file.read_bytes(), file.stat()
            file.write_text(mutant.text)
            child = in_child(folder, partial(survives, tests, folder / FAILURE))
            running[child] = mutant, folder, time.monotonic()
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            mutant, folder, _ = running.pop(child)
            file, (content, was) = folder / PACKAGE / mutant.file, sound.pop(mutant.key)
            file.write_bytes(content)
            os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
            if mutant.key not in verdicts:
                by = (folder / FAILURE).read_text() if (folder / FAILURE).exists() else ""
                word = alive[mutant.key] if os.waitstatus_to_exitcode(status) == 0 else "killed"
                verdicts[mutant.key] = Verdict(word=word, by=by, test_hash=kept.hash_of_test(by))
                killers.add(mutant.key, by)
            free.append(folder)
            verdict = verdicts[mutant.key]
            kept.add(verdicts={mutant.key: asdict(verdict)}, seconds=time.monotonic() - last)
            last = time.monotonic()
            print(f"{len(verdicts)}/{len(mutants)} {verdict.word}: {mutant.key}", file=sys.stderr)
        elif not child:
            for late, (mutant, _, begin) in running.items():
                if time.monotonic() - begin > PER_MUTANT_S and mutant.key not in verdicts:
                    verdicts[mutant.key] = Verdict(word="hung")
                    os.killpg(late, signal.SIGKILL)
            time.sleep(0.02)
    return verdicts


def main() -> int:
    """Make the mutants, run the tests on each, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", metavar="FILE", help=f"one of {', '.join(ONLY)}")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where verdicts are kept, and taken from")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    arguments = parser.parse_args()
    if arguments.only not in (None, *ONLY):
        parser.error(f"no module is called {arguments.only!r}; known: {', '.join(ONLY)}")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as temporary:
        folders = [copy_of_the_tree(Path(temporary) / "0")]
        mutants = all_mutants(folders[0] / PACKAGE, folders[0] / TESTS / "trace_names.json", arguments.only)
        if arguments.list:
            print("\n".join(mutant.key for mutant in mutants))
            return 0
        sys.dont_write_bytecode = True
        import bitsandbytes  # noqa: F401 - children are forked with the libraries loaded
        import peft  # noqa: F401
        import torch._dynamo  # noqa: F401
        from transformers import LlamaForCausalLM  # noqa: F401

        kept = Kept(arguments.keep, folders[0])
        compile_once(folders[0])
        folders += [shutil.copytree(folders[0], Path(temporary) / str(job)) for job in range(1, arguments.jobs)]
        coverage = first_pass(folders[0], kept)
        if coverage.failed:
            print("fail without any mutation:", *coverage.failed, sep="\n  ")
            return 1
        print(f"{len(coverage.seconds)} tests in {sum(coverage.seconds.values()):.0f} s", file=sys.stderr)
        verdicts = judge_mutants(mutants, coverage, folders, kept)
    words = {key: verdict.word for key, verdict in verdicts.items()}
    return report(words, kept.seconds + time.monotonic() - begin)


def report(verdicts: dict[str, str], seconds: float) -> int:
    """Print what survived; 1 if it should not have."""
    kept = [key for key, verdict in verdicts.items() if verdict in ("survived", "untested")]
    unexplained = [key for key in kept if key not in EQUIVALENT]
    counts = Counter(key.partition(":")[0].partition(".")[0] for key in verdicts)
    dead = Counter(key.partition(":")[0].partition(".")[0] for key in verdicts if key not in kept)
    for part, count in counts.items():
        print(f"{part}: {dead[part]} of {count} mutants killed")
    for key in kept:
        print(f"{verdicts[key]}: {key}" + (f"\n    equivalent: {EQUIVALENT[key]}" if key in EQUIVALENT else ""))
    for key in EQUIVALENT:
        if verdicts.get(key) in ("killed", "hung"):
            print(f"listed as equivalent, but killed: {key}")
    print(f"{len(verdicts)} mutants in {seconds / 60:.1f} min: {len(unexplained)} survive unexplained")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())

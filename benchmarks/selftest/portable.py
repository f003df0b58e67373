"""The tests on CPUs that this one can play, and while others want the processors: what passes here passes elsewhere.

    python benchmarks/selftest/portable.py [--only NAME] [--keep FILE] [--list]

What a test of this project expects may rest on the CPU that it was written on: the order in which a library sums, the
precision that it multiplies in, a layout that it chooses, the time that a step took. So all tests are run as narrower
CPUs would run them: torch's own kernels are chosen by ATEN_CPU_CAPABILITY, oneDNN's by ONEDNN_MAX_CPU_ISA, and
bitsandbytes is told that there is no AVX512-BF16 (`narrow_cpu`). And they are run three times with nothing beside them,
and three times beside two busy loops. Whether a setting is in force is asked of the libraries before its tests run;
where it is not, they are not run, and it does not pass.

It takes hours. With ``--keep`` each run's counts are written as it ends, and a later call with the same file goes on
where an earlier one was stopped: only what was found on the same files, to the byte, is taken over. ``--only`` runs
some of the settings; the others are shown as far as they were kept. Hypothesis draws the same examples in every run.

Exit status 1 unless every run of every setting was made and passed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from reading import machine_line

from harness.machine.repository import run_git

ROOT = Path(__file__).parents[2]
NARROW = Path(__file__).with_name("narrow_cpu")
TESTS = ("tests/",)
OPTIONS = ("-n", "3", "--dist", "loadfile", "--no-loadscope-reorder")
"""Those of `make test`."""
MOST_S = 3 * 3600.0
"""Limit of one run: what hangs ends its test before that, by the timeout of pyproject.toml."""
ISA = {
    "AVX2": r"isa:Intel AVX2$",
    "AVX512_CORE": r"isa:Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions$",
    "AVX512_CORE_BF16": r"isa:Intel AVX-512 with Intel DL Boost and bfloat16 support$",
}
"""How oneDNN says which instructions it takes, by the limit that it was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Surroundings in which tests are run."""

    name: str
    variables: tuple[tuple[str, str], ...] = ()
    tests: tuple[str, ...] = TESTS
    rounds: int = 1
    loops: int = 0
    """Busy loops beside the tests."""
    probe: str = "pass"
    """Python that ends with an AssertionError where the setting is not in force."""


def cpu(name: str, *, aten: str = "", onednn: str, packs: bool) -> Setting:
    """A CPU: the capability for which torch's own kernels are compiled, the most that oneDNN takes, and whether
    bitsandbytes finds the registers for which it repacks 4-bit weights. The probe has each library say so."""
    variables = (("ONEDNN_MAX_CPU_ISA", onednn),)
    probe = (
        "import os, re, subprocess, sys\n"
        "code = 'import torch; torch.nn.functional.conv2d(torch.ones(4, 64, 64, 64), torch.ones(64, 64, 3, 3))'\n"
        "told = subprocess.run([sys.executable, '-c', code], env=os.environ | {'ONEDNN_VERBOSE': '1'},"
        " capture_output=True, text=True, check=True).stdout\n"
        f"assert re.search({ISA[onednn]!r}, told, re.MULTILINE), re.findall('isa:.*', told)\n"
    )
    if aten:
        variables += (("ATEN_CPU_CAPABILITY", aten.lower()),)
        probe += f"import torch; found = torch.backends.cpu.get_cpu_capability(); assert found == {aten!r}, found\n"
    if not packs:
        variables += (("PYTHONPATH", str(NARROW)),)
        probe += "import bitsandbytes; assert not bitsandbytes.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu\n"
    return Setting(name=name, variables=variables, probe=probe)


SETTINGS = (
    cpu("ATen at its least", aten="DEFAULT", onednn="AVX512_CORE", packs=False),
    cpu("AVX2", aten="AVX2", onednn="AVX2", packs=False),
    cpu("AVX-512 with bfloat16", onednn="AVX512_CORE_BF16", packs=True),
    Setting(name="idle", rounds=3),
    Setting(name="beside two busy loops", rounds=3, loops=2),
)
"""Each thing that a library lets be held down is in one of them, and most CPUs there are are the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What became of one run of the tests of a setting."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    took_s: float = 0.0
    cpu_s: float = 0.0
    broken: tuple[str, ...] = ()
    """The tests that failed, each with the first line of why."""
    reason: str = ""
    """Why the tests could not be run, or not to their end; empty if they were."""

    @property
    def good(self) -> bool:
        """Whether tests were run to their end and none of them failed."""
        return not self.reason and not self.failed and self.passed > 0


class Kept:
    """What was found by earlier calls on the same files, in a file that is added to."""

    def __init__(self, file: Path | None, files: str) -> None:
        self._file = file
        self._files = files
        self.found: dict[tuple[str, int], Found] = {}
        whole = file.read_text().rpartition("\n")[0] if file is not None and file.exists() else ""
        if file is not None and whole:
            file.write_text(whole + "\n")  # without a line that an end by force has left half
        for entry in map(json.loads, whole.splitlines()):
            if entry["files"] == files:
                found = entry["found"] | {"broken": tuple(entry["found"]["broken"])}
                self.found[entry["setting"], entry["round"]] = Found(**found)

    def add(self, setting: str, number: int, found: Found) -> None:
        """Keep what was found; on the disk as well if there is a file."""
        self.found[setting, number] = found
        if self._file is not None:
            with self._file.open("a") as file:
                entry = {"files": self._files, "setting": setting, "round": number, "found": asdict(found)}
                file.write(json.dumps(entry) + "\n")


def hash_of_files(root: Path) -> str:
    """Of all files of the repository that git does not ignore, the proofs' own output left out."""
    listed = run_git(
        root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".", ":(exclude)reports/proof"
    )
    if listed.returncode:
        raise SystemExit(f"{root}: {listed.stderr.strip()}: what is tested cannot be told from other revisions")
    hashed = hashlib.sha256()
    for name in sorted(set(filter(None, listed.stdout.split("\0")))):
        path = root / name
        content = path.read_bytes() if path.is_file() else b""
        hashed.update(f"{name} {len(content)}\n".encode() + content)
    return hashed.hexdigest()


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes that only want a processor; they end with this one, however it ends."""
    code = "import os, sys\nparent = int(sys.argv[1])\nwhile os.getppid() == parent: sum(range(100_000))"
    running = [subprocess.Popen([sys.executable, "-c", code, str(os.getpid())]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def environment_of(setting: Setting) -> dict[str, str]:
    """This process's, with what the setting changes; a search path goes in front of the one that there is."""
    variables = os.environ | {"CI": "true", "OMP_NUM_THREADS": "1"}
    for name, value in setting.variables:
        behind = variables.get(name, "") if name == "PYTHONPATH" else ""
        variables[name] = os.pathsep.join(filter(None, (value, behind)))
    return variables


def try_setting(setting: Setting, root: Path, *, python: str = sys.executable) -> Found:
    """Run the tests of a setting once with an interpreter, if it is in force there."""
    environment = environment_of(setting)
    asked = subprocess.run([python, "-c", setting.probe], env=environment, capture_output=True, text=True, check=False)
    if asked.returncode:
        return Found(reason=f"not in force on this machine: {_last_line(asked.stderr)}")
    with tempfile.TemporaryDirectory(prefix="portable-") as folder, busy(setting.loops):
        report = Path(folder) / "report.xml"
        words = [python, "-m", "pytest", *setting.tests, *OPTIONS, "-q", "--no-header", f"--junitxml={report}"]
        begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            done = subprocess.run(
                [*words, "-p", "no:cacheprovider"], cwd=root, env=environment, timeout=MOST_S, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Found(reason=f"not at its end after {MOST_S / 3600:g} h")
        took_s, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if done.returncode not in (0, 1) or not report.is_file():
            return Found(reason=f"pytest ended with {done.returncode}: {_last_line(done.stdout)}", took_s=took_s)
        return read_report(report, took_s=took_s, cpu_s=cpu_s, code=done.returncode)


def read_report(path: Path, *, took_s: float, cpu_s: float, code: int) -> Found:
    """Count what pytest wrote of each test. A code of failure without a failed test is a reason of its own."""
    ended: dict[str, int] = {"failure": 0, "error": 0, "skipped": 0}
    broken: dict[str, str] = {}
    names = set()
    skipped = set()
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        names.add(name)
        for kind in ended:
            if (said := case.find(kind)) is not None:
                (skipped.add(name) if kind == "skipped" else broken.setdefault(name, _first_line(said)))
    failed = set(broken)
    return Found(
        passed=len(names - skipped - failed), failed=len(failed), skipped=len(skipped - failed), took_s=took_s,
        cpu_s=cpu_s, broken=tuple(f"{name}: {why}" for name, why in broken.items()),
        reason="pytest ended with 1, and no test is said to have failed" if code and not failed else "",
    )  # fmt: skip


def _first_line(said: ElementTree.Element) -> str:
    return (said.get("message") or said.text or "").strip().partition("\n")[0][:200]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1][:200]


def report(kept: Kept, settings: Sequence[Setting]) -> int:
    """Print a line for each run, and what failed in it; 1 unless all were made and passed."""
    print(f"{'setting':24} {'passed':>7} {'failed':>7} {'skipped':>8} {'minutes':>8} {'of CPU':>7}")
    bad = 0
    for setting in settings:
        for number in range(1, setting.rounds + 1):
            name = setting.name + (f", {number}" if setting.rounds > 1 else "")
            found = kept.found.get((setting.name, number), Found(reason="not run yet"))
            bad += not found.good
            if found.reason and not found.passed + found.failed:
                print(f"{name:24} {found.reason}")
                continue
            print(
                f"{name:24} {found.passed:7} {found.failed:7} {found.skipped:8} {found.took_s / 60:8.1f} "
                f"{found.cpu_s / 60:7.1f}" + (f"  {found.reason}" if found.reason else "")
            )
            for line in found.broken:
                print(f"    failed: {line}")
    total = sum(setting.rounds for setting in settings)
    print(f"{total - bad} of {total} runs were made and passed")
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are not kept, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", choices=[one.name for one in SETTINGS])
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where runs are kept, and taken from")
    parser.add_argument("--list", action="store_true", help="print the settings and run nothing")
    options = parser.parse_args(arguments)
    if options.list:
        print(*(one.name for one in SETTINGS), sep="\n")
        return 0
    files = hash_of_files(ROOT)
    kept = Kept(options.keep, files)
    print(machine_line(), flush=True)
    for setting in SETTINGS:
        for number in range(1, setting.rounds + 1):
            if (options.only and setting.name not in options.only) or (setting.name, number) in kept.found:
                continue
            found = try_setting(setting, ROOT)
            if hash_of_files(ROOT) != files:
                raise SystemExit("files have changed while the tests ran: this run says nothing of either state")
            kept.add(setting.name, number, found)
            print(f"{setting.name} {number}: {found}", file=sys.stderr, flush=True)
    return report(kept, SETTINGS)


if __name__ == "__main__":
    sys.exit(main())

"""What it takes to read a run of very many trials, to report it, and to compare it to another as large.

    python benchmarks/selftest/reading.py [--trials N]

The runs are made up: evidence, single values and manifest are those of a committed run, every sample is a number of its
own in all its digits. Many trials are read twice, as schema 4 wrote them, each with all of its evidence in 9 KB, and as
they are written now. Each run is read in a new process. Seconds are CPU time, which other work hardly changes; the
time that passed stands beside it. Memory is the growth of the peak resident set, over the size of the files.

Exit status 1, with the reasons, if a bound is broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.machine import provenance
from harness.machine.repository import git_state
from harness.records import codec, store
from harness.records.evidence import EvidenceFile
from harness.records.record import SCHEMA, TrialRecord
from harness.records.store import TRIALS
from harness.records.trial_lines import line_of
from harness.studies.study import Study
from harness.studies.study_file import load_study

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "reports" / "2026-11-25_amd-epyc-2cpu_lora-or-qlora"
MIB = 2**20
VARIANTS = 99
"""Of the run of many trials; with the control a replicate has a hundred."""
SAMPLES = 50
"""Timed steps of each of the many trials: what makes a record 9 KB, as they were measured."""
FULL_SCHEMA = 4
"""The last schema whose records hold all of their evidence."""
MOST_READING_S = 10.0
MOST_MEMORY = 4.0
"""Peak memory of reading, over the size of the files."""
MOST_REPORT_S = 3.0
MOST_LARGE_REPORT_S = 30.0
"""Reports of the many variants, and of the many trials; their comparisons, too."""
MOST_PAGE_S = 10.0
MOST_PAGE_BYTES = 3_000_000
MOST_TRIALS_OF_A_PAGE = 10_000
"""Of the page of the many variants; of more trials nobody opens one."""


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    cpu_s: float
    wall_s: float
    grown_bytes: int = 0


def write_run(folder: Path, variants: int, replicates: int, samples: int, *, schema: int) -> Path:
    """A run of a study of so many variants and their control, with so many timed steps in each trial."""
    path = folder / f"{variants}x{replicates}-{schema}"
    path.mkdir()
    study = load_study("lora-or-qlora")
    study = dataclasses.replace(
        study,
        variants=tuple(dataclasses.replace(study.variants[0], name=f"r{r}", r=r) for r in range(1, variants + 1)),
        reference="r1",
        protocol=dataclasses.replace(study.protocol, replicates=replicates, turns=samples // 10, steps_per_turn=10),
    )
    given = store.read_run(str(COMMITTED), COMMITTED.parent)
    template = next(record for record in given.records if record.settled and "step_time_s" in record.samples)
    rng, evidence, order = random.Random(1), EvidenceFile(path), []
    full = functools.cache(lambda checks: codec.dumps(checks_of(template, *checks)))
    names = functools.cache(lambda checks: evidence.add(checks_of(template, *checks)))
    with (path / TRIALS).open("w", encoding="utf-8") as file:
        for record, checks in _records(template, study, samples, rng):
            order.append(record.trial)
            if schema == FULL_SCHEMA:
                line = codec.dumps(record.replaced(schema=schema)) + "\n"
                file.write(line.replace('"checks": []', f'"checks": {full(checks)}', 1))
            else:
                file.write(line_of(record, names(checks)))
    manifest = dataclasses.replace(
        given.manifest, schema=schema, run=path.name, study=codec.to_json(study), order=tuple(order),
        phases=("train",), interleaving="replicates", selection=(), resumed=(), stopped=None, status="complete",
    )  # fmt: skip
    (path / "manifest.json").write_text(codec.dumps(manifest) + "\n", encoding="utf-8")
    return path


def checks_of(template: TrialRecord, rank: int, replicate: int) -> list[dict[str, Any]]:
    """Evidence that is the same in all trials but for one check of each variant and one that varies."""
    checks = [dict(check) for check in template.checks]
    checks[0]["reason"] += f"; adapter of rank {rank}"
    checks[1]["reason"] += f"; {replicate} of another type"
    return checks


def _records(
    template: TrialRecord, study: Study, samples: int, rng: random.Random
) -> Iterator[tuple[TrialRecord, tuple[int, int]]]:
    """Records without their checks, and what `checks_of` makes them from."""
    members = [(variant, "variant") for variant in study.variants] + [(study.variants[0], "control")]
    position = 0
    for replicate in range(study.protocol.replicates):
        for variant, role in members:
            turns = samples // 10
            record = template.replaced(
                trial=f"r{replicate}-{variant.name}{'-control' if role == 'control' else ''}", role=role,
                name=variant.name, variant=variant.id, replicate=replicate, position=position, seed=replicate,
                interleaving="replicates", side="", attempt=0, checks=(), failure=None, notices=(),
                turn_lengths=(10,) * turns, values={key: value * rng.random() for key, value in template.values.items()}
                | {"trainable_parameters": 1000.0 * variant.r, "warmup_steady": 1.0},
                samples={
                    "step_time_s": tuple(rng.lognormvariate(-1.0, 0.02) for _ in range(samples)),
                    "step_cpu_time_s": tuple(rng.lognormvariate(-1.0, 0.02) for _ in range(samples)),
                    "train_loss": tuple(4.0 + rng.random() for _ in range(samples)),
                    "turn_real_tokens": (2560.0,) * turns, "turn_padded_tokens": (0.0,) * turns,
                    "turn_sequences": (20.0,) * turns,
                },
            )  # fmt: skip
            yield record, (variant.r, replicate % 7)
            position += 1


def read_here(path: Path) -> Cost:
    """What reading a run takes in this process, which must be a new one."""
    before, begun, cpu = _resident("VmRSS"), time.perf_counter(), time.process_time()
    run = store.read_run(str(path), path.parent)
    took = time.process_time() - cpu, time.perf_counter() - begun
    if len(run.records) != len(run.manifest.order) or run.damaged_lines or not run.records[-1].checks:
        raise SystemExit(f"{path}: not read as it was written")
    return Cost(*took, grown_bytes=_resident("VmHWM") - before)


def _resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def read_apart(path: Path) -> Cost:
    """What reading a run takes in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--read", str(path)], env=_environment(), stdout=subprocess.PIPE, check=True
    )
    return Cost(**json.loads(done.stdout))


def command_apart(path: Path, *words: str) -> Cost:
    """What a command of `lorameter` takes that reads runs of this kind, from its start to its end."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    called = "import sys; from harness.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", called, *words, "--runs-dir", str(path.parent)],
        env=_environment(), stdout=subprocess.PIPE, check=False,
    )  # fmt: skip
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 3, 4) or b"step time" not in done.stdout:  # 4: its control may differ by chance
        raise SystemExit(f"{path}: no {words[0]}, exit code {done.returncode}")
    return Cost(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def copy_run(path: Path) -> Path:
    """The same trials as another run: what comparing takes does not depend on what they say."""
    copy = path.with_name(path.name + "-again")
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).hardlink_to(file)
    manifest = dataclasses.replace(store.read_manifest(path), run=copy.name)
    (copy / "manifest.json").unlink()
    (copy / "manifest.json").write_text(codec.dumps(manifest) + "\n", encoding="utf-8")
    return copy


def _environment() -> dict[str, str]:
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": search, "COLUMNS": "160"}


def machine_line() -> str:
    """On which machine and from which commit the figures come."""
    facts, git = provenance.probe_machine(), git_state(ROOT)
    load = f"{os.getloadavg()[0]:.1f} processes wanted to run in the last minute"
    changed = " with local changes" if git["dirty"] else ""
    return (
        f"{facts.device_name}, {facts.cpus} CPUs, {facts.memory_bytes / 2**30:.0f} GiB; Python {facts.python}, "
        f"msgspec {provenance.library_version('msgspec')}; commit {str(git['commit'])[:10]}{changed}; {load}"
    )


def judge(path: Path, what: str, most_s: float, say: Callable[[str], None]) -> Iterator[str]:
    """Read a run, report it and compare it to another; yields what does not hold."""
    size = sum(file.stat().st_size for file in path.glob("*.jsonl"))
    trials = len(store.read_manifest(path).order)
    read = read_apart(path)
    ratio = read.grown_bytes / size
    say(
        f"{what}\n  {trials} trials, {size / MIB:.0f} MiB, {size / trials / 1000:.1f} kB each\n"
        f"  read in {read.cpu_s:.2f} s of CPU ({read.wall_s:.2f} s passed; at most {MOST_READING_S:g}); "
        f"memory grew by {read.grown_bytes / MIB:.0f} MiB, {ratio:.2f} times the files (at most {MOST_MEMORY:g})"
    )
    costs = {
        "report": (command_apart(path, "report", str(path)), most_s),
        "compare": (command_apart(path, "compare", str(path), str(copy_run(path))), most_s),
    }
    page = path.with_suffix(".html")
    if trials <= MOST_TRIALS_OF_A_PAGE:
        costs["report --html"] = command_apart(path, "report", str(path), "--html", str(page)), MOST_PAGE_S
    for command, (cost, most) in costs.items():
        say(f"  lorameter {command}: {cost.cpu_s:.2f} s of CPU ({cost.wall_s:.2f} s passed; at most {most:g})")
    size = page.stat().st_size if page.exists() else 0
    if size:
        say(f"  the page has {size / 1e6:.2f} MB (at most {MOST_PAGE_BYTES / 1e6:g})")
    for took, most, thing in (
        (read.cpu_s, MOST_READING_S, "seconds to read"),
        (ratio, MOST_MEMORY, "times its size in memory"),
        (size, MOST_PAGE_BYTES, "bytes of a page"),
        *((cost.cpu_s, most, f"seconds to {command}") for command, (cost, most) in costs.items()),
    ):
        if took > most:
            yield f"{what}: {took:.2f} {thing}, at most {most:g} allowed"


def main(arguments: list[str]) -> int:
    """Make the runs one by one, read, report and compare each, judge."""
    parser = argparse.ArgumentParser(description="Time and memory that it takes to read large runs.")
    parser.add_argument("--trials", type=int, default=100_000, help="trials of the largest run (default: %(default)s)")
    parser.add_argument("--read", metavar="RUN", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.read:
        print(json.dumps(dataclasses.asdict(read_here(options.read))))
        return 0
    many = max(options.trials // (VARIANTS + 1), 2)
    print(machine_line(), flush=True)
    broken: list[str] = []
    for what, shape, schema, most_s in (
        ("many trials, each with all of its evidence", (VARIANTS, many, SAMPLES), FULL_SCHEMA, MOST_LARGE_REPORT_S),
        ("many trials, evidence stored once", (VARIANTS, many, SAMPLES), SCHEMA, MOST_LARGE_REPORT_S),
        ("100 variants, 12 replicates, 200 samples", (100, 12, 200), SCHEMA, MOST_REPORT_S),
    ):
        with tempfile.TemporaryDirectory() as folder:
            path = write_run(Path(folder), *shape, schema=schema)
            broken += judge(path, what, most_s, lambda text: print(text, flush=True))
    for reason in broken:
        print(f"does not hold: {reason}")
    if not broken:
        print("holds: every bound")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

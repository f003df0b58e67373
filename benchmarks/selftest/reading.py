"""Measures time and memory of reading a run of 100,000 trials, of its report, and of comparing it with another run.

    python benchmarks/selftest/reading.py [--trials N]

The runs are synthetic: checks, single values and manifest are those of a committed run, and every sample is a random
number with all digits. Each command runs in a new process. Times are CPU times, which other load hardly affects. Memory
is the growth of the peak resident set as a multiple of the size of the files. A run of 100 variants is also written as
a page.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from shared import ROOT, print_origin, report_violations, run_lorameter

from lorameter.records import codec, store
from lorameter.records.record import TrialRecord
from lorameter.records.store import TRIALS
from lorameter.records.trials import EvidenceFile, encode_record
from lorameter.studies.study import Study
from lorameter.studies.study_file import load_study

COMMITTED = ROOT / "reports" / "2026-11-30_amd-epyc-2cpu_lora-or-qlora"
VARIANTS, SAMPLES = 99, 50
"""Variants, and samples per trial, of the large run: with the control, a replicate has 100 trials."""
MAX_READ_S, MAX_MEMORY = 10.0, 4.0
MAX_REPORT_S, MAX_LARGE_REPORT_S, MAX_PAGE_S, MAX_PAGE_BYTES = 3.0, 60.0, 10.0, 3_000_000
READ = """
import json, sys, time
from pathlib import Path
from lorameter.records import store

def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

path = Path(sys.argv[1])
before, begin = resident("VmRSS"), time.process_time()
run = store.read_run(str(path), path.parent)
seconds = time.process_time() - begin
assert len(run.records) == len(run.manifest.order) and not run.damaged_lines and run.records[-1].checks
print(json.dumps([seconds, resident("VmHWM") - before]))
"""


def write_run(folder: Path, variants: int, replicates: int, samples: int) -> Path:
    """Write a run with these numbers of variants, replicates and timed steps per trial, and return its folder."""
    path = folder / f"{variants}x{replicates}"
    path.mkdir()
    study = load_study("lora-or-qlora")
    study = dataclasses.replace(
        study,
        variants=tuple(dataclasses.replace(study.variants[0], name=f"r{r}", r=r) for r in range(1, variants + 1)),
        reference="r1",
        protocol=dataclasses.replace(study.protocol, replicates=replicates, turns=samples // 10, steps_per_turn=10),
    )
    committed = store.read_run(str(COMMITTED), COMMITTED.parent)
    template = next(record for record in committed.records if record.settled and "step_time_s" in record.samples)
    evidence, order = EvidenceFile(path), []
    add_checks = functools.cache(lambda arguments: evidence.add(_make_checks(template, *arguments)))
    with (path / TRIALS).open("w", encoding="utf-8") as file:
        for record, arguments in _make_records(template, study, samples, random.Random(1)):
            order.append(record.trial)
            file.write(encode_record(record, add_checks(arguments)))
    manifest = msgspec.structs.replace(
        committed.manifest, run=path.name, study=codec.to_json(study), order=tuple(order), phases=("train",),
        interleaving="replicates", selection=(), resumed=(), stopped=None, status="complete",
    )  # fmt: skip
    (path / "manifest.json").write_text(codec.dumps(manifest) + "\n", encoding="utf-8")
    return path


def _make_checks(template: TrialRecord, rank: int, replicate: int) -> list[dict[str, Any]]:
    """Return the checks of a trial: one depends on the variant, one on the replicate, and all others are equal in every
    trial."""
    checks = [dict(check) for check in template.checks]
    checks[0]["reason"] += f"; adapter of rank {rank}"
    checks[1]["reason"] += f"; {replicate} of another type"
    return checks


def _make_records(
    template: TrialRecord, study: Study, samples: int, rng: random.Random
) -> Iterator[tuple[TrialRecord, tuple[int, int]]]:
    """Yield records without their checks, each with the arguments of `_make_checks`."""
    members = [(variant, "variant") for variant in study.variants] + [(study.variants[0], "control")]
    turns = samples // 10
    for replicate in range(study.protocol.replicates):
        for place, (variant, role) in enumerate(members):
            record = template.replaced(
                trial=f"r{replicate}-{variant.name}{'-control' if role == 'control' else ''}", role=role,
                name=variant.name, variant=variant.id, replicate=replicate, position=replicate * len(members) + place,
                seed=replicate, interleaving="replicates", side="", attempt=0, checks=(), failure=None, notices=(),
                turn_lengths=(10,) * turns, values={key: value * rng.random() for key, value in template.values.items()}
                | {"trainable_parameters": 1000.0 * variant.r, "warmup_steady": 1.0},
                samples={
                    "step_time_s": tuple(rng.lognormvariate(-1.0, 0.02) for _ in range(samples)),
                    "step_cpu_time_s": tuple(rng.lognormvariate(-1.0, 0.02) for _ in range(samples)),
                    "timed_loss": tuple(4.0 + rng.random() for _ in range(samples)),
                    "turn_tokens": (2560.0,) * turns, "turn_padded_tokens": (0.0,) * turns,
                    "turn_sequences": (20.0,) * turns,
                },
            )  # fmt: skip
            yield record, (variant.r, replicate % 7)


def copy_run(path: Path) -> Path:
    """Make another run with the same trials, and return its folder."""
    copy = path.with_name(path.name + "-again")
    copy.mkdir()
    for file in path.glob("*.jsonl"):
        (copy / file.name).hardlink_to(file)
    manifest = msgspec.structs.replace(store.read_manifest(path), run=copy.name)
    (copy / "manifest.json").write_text(codec.dumps(manifest) + "\n", encoding="utf-8")
    return copy


def command_cpu_s(path: Path, *words: str) -> float:
    """Run a command that reads the runs in the folder of this run, and return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if "step time" not in run_lorameter([*words, "--runs-dir", str(path.parent)]):
        raise SystemExit(f"{path}: lorameter {words[0]} did not print step times")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def judge(path: Path, max_report_s: float, *, page: bool) -> Iterator[str]:
    """Read a run, report it and compare it with another; print each measurement and yield the bounds that do not
    hold."""
    size, trials = sum(file.stat().st_size for file in path.glob("*.jsonl")), len(store.read_manifest(path).order)
    print(f"{trials} trials, {size / 2**20:.0f} MiB, {size / trials / 1000:.1f} kB each")
    read = subprocess.run(
        [sys.executable, "-c", READ, str(path)], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True
    )
    seconds, growth = json.loads(read.stdout)
    measurements = [
        ("s of CPU to read", seconds, MAX_READ_S),
        ("times the size of the files in memory", growth / size, MAX_MEMORY),
        ("s of CPU for lorameter report", command_cpu_s(path, "report", str(path)), max_report_s),
        (
            "s of CPU for lorameter compare",
            command_cpu_s(path, "compare", str(path), str(copy_run(path))),
            max_report_s,
        ),
    ]
    if page:
        html = path.with_suffix(".html")
        page_s = command_cpu_s(path, "report", str(path), "--html", str(html))
        measurements += [
            ("s of CPU for the page", page_s, MAX_PAGE_S),
            ("MB of page", html.stat().st_size / 1e6, MAX_PAGE_BYTES / 1e6),
        ]
    for name, value, maximum in measurements:
        print(f"  {value:.2f} {name} (at most {maximum:g})", flush=True)
        if value > maximum:
            yield f"{trials} trials: {value:.2f} {name}, at most {maximum:g} are allowed"


def main() -> int:
    """Write and judge both runs; return 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100_000, help="trials of the large run (default: %(default)s)")
    options = parser.parse_args()
    print_origin()
    violations: list[str] = []
    replicates = max(options.trials // (VARIANTS + 1), 2)
    for shape, max_report_s, page in (
        ((VARIANTS, replicates, SAMPLES), MAX_LARGE_REPORT_S, False),
        ((100, 12, 200), MAX_REPORT_S, True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            violations += judge(write_run(Path(folder), *shape), max_report_s, page=page)
    return report_violations(violations)


if __name__ == "__main__":
    sys.exit(main())

"""What it takes to make the index of a thousand runs, to ask it, and to see in it a year of nightly runs.

    python benchmarks/selftest/index_cost.py [--runs N]

The runs are made up of one that this repository holds (30 trials of four variants): each is a night, with its own
commit, its step times moved by 2 % from night to night, two changes of torch and one commit that costs 10 %. Each part
is timed in a process of its own, and what a user waits for, the whole command, stands beside what is judged: making the
index, and asking it when it is there, which looks at the files of every run.

Exit status 1, with the reasons, if making takes more than 30 s of CPU, asking more than 0.2 s, or the history does not
show the breaks and the commit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.machine.provenance import fingerprint, origin_of
from harness.records import codec, store
from harness.records.evidence import EvidenceFile
from harness.records.trial_lines import line_of
from harness.results.history import history_of
from harness.results.index import index_file, open_index

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "reports" / "2026-11-25_amd-epyc-2cpu_lora-or-qlora"
VARIANT = "qlora-nf4-r16"
MOST_MAKING_S, MOST_ASKING_S = 30.0, 0.2
NIGHT_SD, PLANTED = 0.02, 0.10
DRAWS = 40
BREAKS = (0.3, 0.6)
"""Where torch changes, and then the one commit, as shares of all nights."""
CULPRIT = 0.8


def write_runs(folder: Path, count: int) -> None:
    """So many nights; what their trials hold is one of `DRAWS`, fast or slow."""
    given = store.read_run(str(TEMPLATE), TEMPLATE.parent)
    evidence = EvidenceFile(folder)
    names = {record.trial: evidence.add(record.checks) for record in given.records}
    checks, rng = (folder / "checks.jsonl").read_bytes(), random.Random(1)
    (folder / "checks.jsonl").unlink()
    draws = [math.exp(rng.gauss(0.0, NIGHT_SD)) for _ in range(DRAWS)]
    trials = {slow: [_trials(given, names, draw * (1 + PLANTED * slow)) for draw in draws] for slow in (False, True)}
    base = codec.to_json(given.manifest)
    for night in range(count):
        path = folder / f"night-{night:04d}"
        path.mkdir()
        (path / "checks.jsonl").write_bytes(checks)
        (path / store.TRIALS).write_text(rng.choice(trials[night >= CULPRIT * count]), encoding="utf-8")
        (path / store.MANIFEST).write_text(codec.dumps(_manifest(base, path.name, night, count)), encoding="utf-8")


def _trials(given: store.Run, names: dict[str, tuple[str, ...]], moved: float) -> str:
    """All lines of a run, its times moved by a factor."""
    lines = []
    for record in given.records:
        samples = {
            name: tuple(moved * value for value in values) if name.endswith("_time_s") else values
            for name, values in record.samples.items()
        }
        lines.append(line_of(record.replaced(samples=samples, checks=()), names[record.trial]))
    return "".join(lines)


def _manifest(base: dict[str, Any], name: str, night: int, count: int) -> dict[str, Any]:
    torch = sum(night >= place * count for place in BREAKS)
    provenance = base["provenance"] | {
        "libraries": base["provenance"]["libraries"] | {"torch": f"2.{11 + torch}.0"},
        "git": {"commit": f"{night + 1:08x}" * 5, "dirty": False},
    }
    return base | {
        "run": name,
        "created_unix_s": 1.76e9 + 86400.0 * night,
        "provenance": provenance,
        "fingerprint": fingerprint(provenance),
    }


def time_here(runs: Path, *, rebuild: bool) -> dict[str, float]:
    """Seconds that passed, and of CPU, for making the index or for asking it, in this process."""
    if not rebuild:  # what a process loads once is no part of a question
        with open_index(runs) as index:
            history_of(index, variant=VARIANT)
    taken = []
    for _ in range(1 if rebuild else 5):
        begun, cpu = time.perf_counter(), time.process_time()
        with open_index(runs, rebuild=rebuild) as index:
            if not rebuild:
                history_of(index, variant=VARIANT)
        taken.append((time.perf_counter() - begun, time.process_time() - cpu))
    return {"wall_s": statistics.median(one for one, _ in taken), "cpu_s": statistics.median(two for _, two in taken)}


def time_apart(runs: Path, *words: str) -> dict[str, float]:
    """The same in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--time", str(runs), *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def command_apart(runs: Path) -> tuple[float, dict[str, Any]]:
    """Seconds that `lorameter history` takes from its start to its end, and what it says."""
    words = ["history", "--variant", VARIANT, "--runs-dir", str(runs), "--json"]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "harness.cli", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return time.perf_counter() - begun, dict(json.loads(done.stdout))


def main(arguments: list[str]) -> int:
    """Write the runs, make the index, ask, judge."""
    parser = argparse.ArgumentParser(description="What the index of many runs takes.")
    parser.add_argument("--runs", type=int, default=1000, help="runs (default: %(default)s)")
    parser.add_argument("--time", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rebuild", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.time:
        print(json.dumps(time_here(options.time, rebuild=options.rebuild)))
        return 0
    print(origin_of(ROOT), flush=True)
    with tempfile.TemporaryDirectory() as name:
        runs = Path(name)
        write_runs(runs, options.runs)
        size = sum(file.stat().st_size for file in runs.rglob("*") if file.is_file())
        made, asked = time_apart(runs, "--rebuild"), time_apart(runs)
        held = index_file(runs).stat().st_size
        whole, document = command_apart(runs)
        index_file(runs).unlink()
    (track,) = document["tracks"]
    suspected = [found["after"]["run"] for line in track["lines"] for found in line["suspicions"]]
    culprit = f"night-{math.ceil(CULPRIT * options.runs):04d}"
    print(f"{options.runs} runs of 30 trials, {size / 2**20:.0f} MiB; the index takes {held / 2**20:.1f} MiB")
    print(f"made anew in {made['cpu_s']:.1f} s of CPU ({made['wall_s']:.1f} s passed; at most {MOST_MAKING_S:g})")
    print(f"asked in {asked['cpu_s']:.3f} s of CPU ({asked['wall_s']:.3f} s passed; at most {MOST_ASKING_S:g})")
    print(f"lorameter history from its start to its end: {whole:.2f} s passed")
    print(f"known breaks at {', '.join(one['after']['run'] for one in track['breaks'])}; suspected: {suspected}")
    reasons = []
    if made["cpu_s"] > MOST_MAKING_S:
        reasons.append(f"the index is made in {made['cpu_s']:.1f} s")
    if asked["cpu_s"] > MOST_ASKING_S:
        reasons.append(f"it is asked in {asked['cpu_s']:.3f} s")
    if len(track["breaks"]) != len(BREAKS):
        reasons.append(f"{len(track['breaks'])} breaks are shown, and torch changed {len(BREAKS)} times")
    if culprit not in suspected:
        reasons.append(f"{culprit} is not suspected")
    for reason in reasons:
        print(f"does not hold: {reason}")
    if not reasons:
        print("holds: every bound")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

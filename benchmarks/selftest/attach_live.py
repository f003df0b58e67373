"""Does an A/B of two scripts keep its word on this machine? Forty of each kind, as a user starts them.

- a script against itself: at most five of forty call a difference, and as many while a process for each CPU does
  nothing but compute;
- a script against one whose step has 104 pieces of work in place of 100: called slower in at least 36 of 40. Beside the
  same load nothing is promised of it: how often it is found is counted. The occupancy of every try is printed.

A step is more than its pieces, so what is planted is a little less than 4 %. How much is measured once: a try against
the same script without any piece.

    python benchmarks/selftest/attach_live.py [--tries N] [--part PART ...] [--keep FILE] [--minutes M]

Every try is kept in FILE as soon as it has ended, with the machine, the libraries and the commit that it was made with.
A later call takes over what it finds there of the same machine and libraries; the commits are printed. It ends with 1
where the word was not kept, also where there are fewer tries than forty of a kind. It takes about three hours and wants
the machine to itself; with ``--minutes`` it stops after the try under way.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.machine.provenance import origin_of
from harness.records import journal
from harness.records.units import format_ratio

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("attach_script.py")
PIECES, PLANTED = 100, 104
PARTS = {"identical": PIECES, "loaded": PIECES, "planted": PLANTED, "planted-loaded": PLANTED}
"""Each kind of try, and how many pieces the candidate has."""
LOADED = ("loaded", "planted-loaded")
EMPTY = "empty"
"""The one try that says what of a step are pieces: its candidate has none."""
FALSE_ALARMS, FOUND = 5 / 40, 36 / 40
REPLICATES, STEPS = 8, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One A/B of two scripts."""

    part: str
    number: int
    verdict: str
    """On the time of a step."""
    verdicts: dict[str, str]
    """On everything that was judged."""
    ratio: float | None
    low: float | None
    high: float | None
    control: str
    interleaving: str
    exit_code: int
    notices: tuple[str, ...]
    occupancy: float | None
    """CPU time over wall time of the timed steps, the lowest of all trials."""
    seconds: float
    origin: str
    """The machine, its libraries and the commit."""

    @property
    def alarmed(self) -> bool:
        """Whether a difference was called, either way, by whatever was judged, or the run came out as invalid."""
        return self.exit_code not in (0, 3) or any(one in ("regressed", "improved") for one in self.verdicts.values())


@contextlib.contextmanager
def hogs() -> Iterator[None]:
    """A process for each CPU that only computes."""
    processes = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(len(os.sched_getaffinity(0)))
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def attempt(part: str, number: int, folder: Path, origin: str) -> Try:
    """One try, in a folder that holds the script."""
    candidate = PARTS.get(part, 0)
    commands = [shlex.join(["python", SCRIPT.name, "--pieces", str(pieces)]) for pieces in (PIECES, candidate)]
    command = [
        sys.executable, "-m", "harness.cli", "ab", "--base-command", commands[0], "--candidate-command", commands[1],
        "--replicates", str(REPLICATES), "--steps", str(STEPS), "--runs-dir", str(folder / "runs"), "--json",
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    begin = time.monotonic()
    with hogs() if part in LOADED else contextlib.nullcontext():
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=folder, env=os.environ | {"PYTHONPATH": path}
        )
    seconds = time.monotonic() - begin
    if not done.stdout.strip():
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    document = json.loads(done.stdout)
    step = next(row for row in document["comparisons"] if row["metric"] == "step_time_s")
    return Try(
        part=part,
        number=number,
        verdict=step["verdict"],
        verdicts={row["metric"]: row["verdict"] for row in document["comparisons"]},
        ratio=step["ratio"],
        low=step["low"],
        high=step["high"],
        control=(document["control"]["train"] or {}).get("verdict", "not measured"),
        interleaving=document["interleaving"],
        exit_code=done.returncode,
        notices=tuple(notice["code"] for notice in document["notices"]),
        occupancy=occupancy(Path(document["path"])),
        seconds=seconds,
        origin=origin,
    )


def occupancy(run: Path) -> float | None:
    """The lowest share of a CPU that a trial of the run had while it was timed."""
    shares = []
    for line in (run / "trials.jsonl").read_text(encoding="utf-8").splitlines():
        samples = json.loads(line)["samples"]
        if wall := sum(samples.get("step_time_s", ())):
            shares.append(sum(samples["step_cpu_time_s"]) / wall)
    return min(shares, default=None)


def read_tries(path: Path, origin: str) -> list[Try]:
    """Those that an earlier call has kept, of this machine with these libraries."""
    kept = []
    for line in journal.lines(path):
        with contextlib.suppress(json.JSONDecodeError):  # a line that an end by force has left half
            kept.append(json.loads(line))
    tries = [Try(**{**one, "notices": tuple(one["notices"])}) for one in kept]
    return [one for one in tries if split_origin(one.origin)[0] == split_origin(origin)[0]]


def split_origin(origin: str) -> tuple[str, str]:
    """What the machine and its libraries are, and the commit."""
    surroundings, _, commit = origin.rpartition("; ")
    return surroundings, commit


def broken_promises(tries: list[Try], parts: Sequence[str], number: int) -> list[str]:
    """What was promised and not kept of so many tries of each part; more or fewer than forty scale the promises."""
    found = []
    for part in parts:
        group = [one for one in tries if one.part == part]
        if len(group) < number:
            found.append(f"{part}: {len(group)} of {number} tries were made")
        elif part == "planted-loaded":
            continue  # as measured
        elif part == "planted":
            slower = sum(one.verdict == "regressed" for one in group)
            if slower < FOUND * len(group):
                found.append(f"planted: found in {slower} of {len(group)}, promised 36 of 40")
        else:
            alarms = sum(one.alarmed for one in group)
            if alarms > FALSE_ALARMS * len(group):
                found.append(f"{part}: {alarms} of {len(group)} call a difference, promised 5 of 40 at most")
    return found


def say_planted(empty: Try | None) -> str:
    """How much of a step is planted, by what remains of one without pieces."""
    if empty is None or empty.ratio is None:
        return "what of a step are pieces was not measured"
    share = 1 - empty.ratio
    return f"{share:.1%} of a step are pieces, so {share * (PLANTED / PIECES - 1):.2%} of a step is planted"


def say_found(part: str, group: Sequence[Try]) -> str:
    """What was called how often, and what CPU these tries had."""
    if not group:
        return f"{part}: no try was made"
    counts = Counter(one.verdict for one in group)
    shares = sorted(one.occupancy for one in group if one.occupancy is not None)
    had = f"; least {shares[0]:.0%} to {shares[-1]:.0%} of a CPU" if shares else ""
    slower = f"found in {counts['regressed']} of {len(group)}: " if PARTS[part] == PLANTED else ""
    return f"{part}: {slower}{', '.join(f'{count} {verdict}' for verdict, count in counts.most_common())}{had}"


def say(one: Try) -> str:
    """A line of the report."""
    share = "unknown" if one.occupancy is None else f"{one.occupancy:.0%}"
    others = ", ".join(f"{metric} {verdict}" for metric, verdict in one.verdicts.items() if metric != "step_time_s")
    return (
        f"  {one.part:<14} {one.number:>2}  {format_ratio(one.ratio, one.low, one.high):<24} {one.verdict:<12} exit "
        f"{one.exit_code}, control {one.control}, {one.interleaving}, least {share} of a CPU, "
        f"{one.seconds:.0f} s; {others}"
    )


def main() -> int:
    """Make what is missing, print all, and say whether the word was kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=40)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--keep", type=Path, default=Path("attach.jsonl"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no try after that (default: no limit)")
    options = parser.parse_args()
    origin, end = origin_of(ROOT), time.monotonic() + 60 * options.minutes
    tries = read_tries(options.keep, origin)
    made = {(one.part, one.number) for one in tries}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
        # All kinds in turn: a call that is stopped leaves as many of each.
        kinds = [(EMPTY, 0), *((part, number) for number in range(options.tries) for part in options.part)]
        for part, number in kinds:
            if (part, number) not in made and time.monotonic() < end:
                tries.append(attempt(part, number, folder, origin))
                journal.append(options.keep, json.dumps(dataclasses.asdict(tries[-1])) + "\n")
                print(say(tries[-1]), file=sys.stderr, flush=True)
    tries = [one for one in tries if (one.part, one.number) in kinds]
    commits = Counter(split_origin(one.origin)[1] for one in tries)
    made_at = ", ".join(f"{count} at {commit}" for commit, count in commits.items())
    print(f"{split_origin(origin)[0]}; tries: {made_at}")
    print(f"{REPLICATES} replicates of {STEPS} timed steps, {PIECES} against {PLANTED} pieces of work where planted")
    print(say_planted(next((one for one in tries if one.part == EMPTY), None)) + "\n")
    for part in options.part:
        group = sorted((one for one in tries if one.part == part), key=lambda one: one.number)
        print(say_found(part, group))
        print("\n".join(map(say, group)) + "\n")
    broken = broken_promises(tries, options.part, options.tries)
    print("\n".join(broken) if broken else "every promise was kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

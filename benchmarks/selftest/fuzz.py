"""Inputs that nobody should be able to do harm with, at every door: a hundred thousand files, two thousand lines.

    python benchmarks/selftest/fuzz.py [--inputs N] [--lines N] [--seed S] [--door NAME] [--keep DIR] [--again DIR]

Each input is a good one with something odd in it (`hostile`), drawn by a generator whose seed is the number of the
input, so that any of them can be had again by its number. It goes through a door (`hostile_doors`) in a process that
may have 1 GiB more memory than it began with and 10 s for an input, not counting time for which it wanted a processor
that others had. An input fails where it is neither read nor refused: by a traceback, exit code 70, a control character
among what is shown, more time, more memory, a death. What failed is kept with --keep; tests/corpus holds what ever did,
and `make test` reads it again.

Exit status 1 if any input failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from unittest import mock

import hostile_lines
import psutil
from hostile_door import REFUSALS, Door
from hostile_doors import DOORS

from kernels_check.visible import make_visible

MOST_S = 10.0
MOST_BYTES = 1 << 30
BATCH = 500
"""Inputs of one process: what one leaves behind is not met by very many others."""


class TooLongError(BaseException):
    """An input took more than `MOST_S`; no `except Exception` on its way may take it for one of its own."""


@dataclass(kw_only=True)
class Outcome:
    """What became of the inputs of a door."""

    read: int = 0
    refused: int = 0
    failed: list[tuple[int, str]] = field(default_factory=list)
    """Number of the input and what happened, in a line."""
    slowest_s: float = 0.0


def input_of(door: Door, seeds: Sequence[bytes], number: int, seed: int) -> bytes:
    """Input `number` of a door."""
    source = random.Random(f"{seed} {door.name} {number}")
    return door.spoil(source, source.choice(seeds))


def acts_on_terminal(text: str) -> str | None:
    """The first character of a text that acts on a terminal; None where none does."""
    return next((character for character in text if make_visible(character) != character), None)


def try_input(door: Door, content: bytes) -> str:
    """`read`, `refused`, or what went wrong in a line."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, mock.patch.dict(os.environ):  # a door sets variables
        try:
            shown = door.enter(Path(folder), content)
            word = "read"
        except REFUSALS as error:
            shown, word = make_visible(str(error)), "refused"
        except TooLongError:
            return f"more than {MOST_S:g} s"
        except MemoryError:
            return "more than 1 GiB"
        except BaseException as error:  # whatever it is
            return f"{type(error).__name__}: {_where(error)}: {str(error)[:200]!r}"
    character = acts_on_terminal(shown)
    return word if character is None else f"shows {character!r} raw"


def _where(error: BaseException) -> str:
    """The last line of this project in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/harness/" in frame.filename or "/kernels_check/" in frame.filename]
    frame = (ours or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"


class Patience:
    """The time that a process has taken since it was last asked for something, without its waits for a processor.

    How long those were is told by the kernel (schedstat, in ns), for the process and for what it has started.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.begin()

    def begin(self) -> None:
        """From now on."""
        self._before_s, self._begin = _waited_s(self._pid), time.monotonic()

    def spent_s(self, *, with_children: bool = False) -> float:
        """How long it has taken until now; looking for its children takes milliseconds."""
        waited_s = _waited_s(self._pid) - self._before_s
        if with_children:
            with contextlib.suppress(psutil.NoSuchProcess):
                waited_s += sum(_waited_s(child.pid) for child in psutil.Process(self._pid).children(recursive=True))
        return time.monotonic() - self._begin - waited_s


def _waited_s(pid: int) -> float:
    """For which a process wanted a processor and had none; 0 of one that is gone, and where nobody counts."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def limit_process() -> Patience:
    """1 GiB beside what is mapped already, no core file, and an alarm that ends an input."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES, mapped + MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    patience = Patience(os.getpid())

    def end(number: int, frame: FrameType | None) -> None:
        left = MOST_S - patience.spent_s(with_children=True)
        if left <= 0:
            raise TooLongError
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.1))

    signal.signal(signal.SIGALRM, end)
    return patience


def in_process(numbers: Sequence[int], attempt: Callable[[int], str]) -> Iterator[tuple[int, str, float]]:
    """What became of each number in a process of its own, and how long it took; one that dies ends with its number."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        status = 1
        try:
            patience = limit_process()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)  # what libraries print by themselves is no part of the counts
            with os.fdopen(write, "w", buffering=1, encoding="utf-8", errors="replace") as reply:
                for number in numbers:
                    patience.begin()
                    signal.setitimer(signal.ITIMER_REAL, MOST_S)
                    try:
                        said = attempt(number)
                    except TooLongError:
                        said = f"more than {MOST_S:g} s"
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    reply.write(f"{number}\t{patience.spent_s():.3f}\t{said!r}\n")
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    left, patience = list(numbers), Patience(pid)
    with os.fdopen(read, encoding="utf-8", errors="replace") as answers:
        while left:
            patience.begin()
            ready: list[object] = []
            while not ready and patience.spent_s(with_children=True) < 3 * MOST_S:
                ready, _, _ = select.select([answers], [], [], MOST_S)
            line = answers.readline() if ready else ""
            if not line:
                os.kill(pid, signal.SIGKILL)
                yield left.pop(0), "the process died" if ready else f"more than {3 * MOST_S:g} s in one call", 0.0
                break
            number, seconds, said = line.rstrip("\n").split("\t", 2)
            left.remove(int(number))
            yield int(number), said[1:-1], float(seconds)
    os.waitpid(pid, 0)
    if left:
        yield from in_process(left, attempt)


def fuzz_door(door: Door, count: int, seed: int, keep: Path | None) -> Outcome:
    """So many inputs of one door."""
    seeds, outcome = door.seeds(), Outcome()
    begin = 0
    while begin < count:
        numbers = range(begin, min(begin + BATCH, count))
        for number, said, seconds in in_process(numbers, lambda n: try_input(door, input_of(door, seeds, n, seed))):
            _count(outcome, number, "", said, seconds)
            if keep is not None and said not in ("read", "refused"):
                (keep / door.name).mkdir(parents=True, exist_ok=True)
                (keep / door.name / f"{seed}-{number}").write_bytes(input_of(door, seeds, number, seed))
        begin += BATCH
    return outcome


def fuzz_lines(count: int, seed: int) -> Outcome:
    """So many command lines, in a copy of the constructed runs and files."""
    outcome = Outcome()
    with hostile_lines.stand_in():
        for begin in range(0, count, BATCH):
            numbers = range(begin, min(begin + BATCH, count))
            for number, said, seconds in in_process(numbers, lambda n: hostile_lines.try_line(n, seed)):
                _count(outcome, number, repr(hostile_lines.line_of(number, seed)), said, seconds)
    return outcome


def replay(corpus: Path) -> Outcome:
    """What ever failed, again: the files of each door, and the command lines."""
    outcome = Outcome()
    files = sorted((path for path in corpus.glob("*/*") if path.is_file()), key=lambda path: path.relative_to(corpus))
    for path in files:  # the seeds of a door are made before its process
        DOORS[path.parent.name].seeds()

    def file(number: int) -> str:
        return try_input(DOORS[files[number].parent.name], files[number].read_bytes())

    for number, said, seconds in in_process(range(len(files)), file):
        _count(outcome, number, str(files[number].relative_to(corpus)), said, seconds)
    lines = [json.loads(line) for line in (corpus / "lines.jsonl").read_text(encoding="utf-8").splitlines()]
    with hostile_lines.stand_in():
        for number, said, seconds in in_process(range(len(lines)), lambda n: hostile_lines.try_words(lines[n])):
            _count(outcome, number, repr(lines[number]), said, seconds)
    return outcome


def _count(outcome: Outcome, number: int, what: str, said: str, seconds: float) -> None:
    outcome.slowest_s = max(outcome.slowest_s, seconds)
    if said in ("read", "refused"):
        outcome.read += said == "read"
        outcome.refused += said == "refused"
    else:
        outcome.failed.append((number, f"{what}: {said}" if what else said))


def report(name: str, outcome: Outcome) -> None:
    """A line of counts, and each kind of failure with one example."""
    total = outcome.read + outcome.refused + len(outcome.failed)
    print(
        f"{name:14} {total:7} inputs: {outcome.read:7} read, {outcome.refused:7} refused, {len(outcome.failed):5} "
        f"failed; slowest {outcome.slowest_s:.2f} s",
        flush=True,
    )
    kinds = Counter(said.split(": '")[0][:120] for _, said in outcome.failed)
    for kind, times in kinds.most_common(40):
        number, said = next(one for one in outcome.failed if one[1].startswith(kind))
        print(f"    {times:5} × {make_visible(said)[:260]} (number {number})", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Try them all and say what became of them."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--inputs", type=int, default=100_000)
    options.add_argument("--lines", type=int, default=2_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--door", action="append", choices=sorted(DOORS), default=[])
    options.add_argument("--keep", type=Path, help="a folder for the inputs that fail")
    options.add_argument("--again", type=Path, metavar="CORPUS", help="a folder of inputs that once failed")
    given = options.parse_args(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "TERM": "dumb"}
    gc.freeze()
    shares = sum(door.share for door in DOORS.values())
    failed = total = 0
    if given.again is not None:
        outcome = replay(given.again)
        report("corpus", outcome)
        failed += len(outcome.failed)
    for door in DOORS.values() if given.inputs else ():
        if given.door and door.name not in given.door:
            continue
        count = given.inputs if given.door else -(-given.inputs * door.share // shares)
        outcome = fuzz_door(door, count, given.seed, given.keep)
        report(door.name, outcome)
        failed, total = failed + len(outcome.failed), total + count
    if given.lines and not given.door:
        outcome = fuzz_lines(given.lines, given.seed)
        report("command lines", outcome)
        failed += len(outcome.failed)
    print(f"{total} inputs and {0 if given.door else given.lines} command lines, seed {given.seed}: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

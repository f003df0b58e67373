"""What the inputs are made of: good ones of each kind, as they are constructed for the golden tests or shipped."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from hostile import Mutator

from harness.records import store
from harness.records.evidence import CHECKS, EvidenceFile
from harness.records.trial_lines import line_of

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def studies() -> list[bytes]:
    """The studies that ship, and one that cannot be."""
    built_in = sorted((ROOT / "harness" / "studies").glob("*.toml"))
    return [path.read_bytes() for path in (*built_in, GOLDEN / "files" / "impossible.toml")]


def files(*names: str) -> Callable[[], list[bytes]]:
    """Constructed files of some names."""
    return lambda: [(GOLDEN / "files" / name).read_bytes() for name in names]


def of_runs(name: str) -> Callable[[], list[bytes]]:
    """The file of that name of each run, under the run's name."""
    return lambda: [run.encode() + b"\n" + (GOLDEN / "runs" / run / name).read_bytes() for run in RUNS]


def checks() -> list[bytes]:
    """The evidence of a run, under its name."""
    return [b"full-checks\n" + written_anew()[0]]


@cache
def written_anew() -> tuple[bytes, bytes]:
    """Evidence and records of a run as they are written now: the constructed one holds its evidence in its records."""
    run = store.read_run("full-checks", GOLDEN / "runs")
    with tempfile.TemporaryDirectory() as folder:
        evidence = EvidenceFile(Path(folder))
        lines = [line_of(record, evidence.add(record.checks)) for record in run.records]
        return (Path(folder) / CHECKS).read_bytes(), "".join(lines).encode()


def keep_head(spoil: Mutator) -> Mutator:
    """The same for a content whose first line says which run it belongs to."""

    def spoilt(source, content):
        head, _, rest = content.partition(b"\n")
        return head + b"\n" + spoil(source, rest)

    return spoilt


def records() -> list[bytes]:
    """A few records."""
    rows = [{"instruction": f"say {n}", "context": "", "response": f"it is {n}"} for n in range(6)]
    return ["\n".join(map(json.dumps, rows)).encode()]


def listed_records() -> list[bytes]:
    """The same as one list."""
    return [b"[" + b",".join(records()[0].splitlines()) + b"]"]


def baselines() -> list[bytes]:
    """Two accepted runs, one of which is gone."""
    manifest = store.read_manifest(GOLDEN / "runs" / "sound")
    known = {"fingerprint": manifest.fingerprint, "study": manifest.study["name"]}
    one = {**known, "run": "sound", "accepted_unix_s": 1.0}
    return [json.dumps({"schema": 1, "baselines": [one, {**one, "run": "gone", "study": "x"}]}).encode()]


RUNS = ("sound", "ab", "again", "cold", "swept", "schema-1", "interrupted", "diverged", "one-replicate")

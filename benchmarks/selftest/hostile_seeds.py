"""What the inputs are made of: good ones of each kind, as they are constructed for the golden tests or shipped."""

from __future__ import annotations

import json
import struct
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


def configs() -> list[bytes]:
    """The configurations of the catalogue."""
    return [path.read_bytes() for path in sorted((ROOT / "harness" / "models").glob("*.json"))]


def ggufs() -> list[bytes]:
    """The smallest file of a model."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def pair(key: str, value: int | str) -> bytes:
        return text(key) + (
            struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value)
        )

    about: dict[str, int | str] = {
        "general.architecture": "llama", "llama.embedding_length": 64, "llama.feed_forward_length": 128,
        "llama.block_count": 2, "llama.attention.head_count": 4, "llama.vocab_size": 300, "llama.context_length": 256,
    }  # fmt: skip
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(about))
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 64, 300, 0, 0)
    body = head + b"".join(pair(key, value) for key, value in about.items()) + tensor
    return [body + b"\0" * (-len(body) % 32) + b"\0" * (64 * 300 * 4)]


def answers() -> list[bytes]:
    """What an interpreter says of itself."""
    answer = {
        "python": "3.11.7",
        "executable": "/bin/python",
        "packages": {"torch": "2.13"},
        "origins": {"torch": None},
    }
    return [json.dumps(answer).encode()]


def records() -> list[bytes]:
    """A few records."""
    rows = [{"instruction": f"say {n}", "context": "", "response": f"it is {n}"} for n in range(6)]
    return ["\n".join(map(json.dumps, rows)).encode()]


def baselines() -> list[bytes]:
    """Two accepted runs, one of which is gone."""
    manifest = store.read_manifest(GOLDEN / "runs" / "sound")
    known = {"fingerprint": manifest.fingerprint, "study": manifest.study["name"]}
    one = {**known, "run": "sound", "accepted_unix_s": 1.0}
    return [json.dumps({"schema": 1, "baselines": [one, {**one, "run": "gone", "study": "x"}]}).encode()]


RUNS = ("sound", "ab", "again", "cold", "swept", "schema-1", "interrupted", "diverged", "one-replicate")

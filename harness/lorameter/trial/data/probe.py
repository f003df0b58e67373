"""Data that a library reads whose faults are no exceptions, looked into in a process of its own.

Tables of Arrow and Parquet are read by code that takes a file's own word for where things lie. A few changed bytes are
enough for it to reach outside of its memory, which the kernel answers with a signal, or to ask for as much as there is.
Whoever looks before a run begins must not end by that. So it looks there, within bounds, and hears what became of it.
"""

from __future__ import annotations

import os
import subprocess
import sys

from lorameter.errors import UsageError, shorten
from lorameter.machine.processes import PARENT, exit_words
from lorameter.records import codec
from lorameter.studies.data_source import PACKED, DataSource
from lorameter.studies.workload import Workload

TIMEOUT_S = 180.0
"""The libraries are imported in 3 to 5 s; a cold disk and a busy machine can make it a minute."""
REMEDY = "Restore it, or save it again."


def is_risky(source: DataSource) -> bool:
    """Whether the data is read by such a library."""
    return source.kind == "saved" or any(path.name.removesuffix(PACKED).endswith(".parquet") for path in source.files)


def probe_in_subprocess(workload: Workload) -> str:
    """What `lorameter.trial.data.records.describe_data` says. Raises `UsageError`, also where its process dies or
    hangs."""
    where = f"data {shorten(repr(workload.data))}"
    own = {PARENT: str(os.getpid()), "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lorameter.worker", "look"],
            input=codec.dumps(workload).encode(),
            capture_output=True,
            env={**os.environ, **own},
            start_new_session=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"{where}: cannot be read: no record came within {TIMEOUT_S:g} s. {REMEDY}") from None
    return read_answer(done.returncode, done.stdout, done.stderr, where)


def read_answer(code: int, printed: bytes, said: bytes, where: str) -> str:
    """What a process that looked has found, by how it ended and by its last line. Raises `UsageError`."""
    lines = printed.decode(errors="replace").strip().splitlines()
    try:
        answer = codec.parse(lines[-1]) if code == 0 and lines else None
    except codec.NotJsonError:
        answer = None
    if isinstance(answer, dict) and isinstance(found := answer.get("found"), str):
        return found
    if isinstance(answer, dict) and isinstance(refusal := answer.get("error"), str):
        raise UsageError(refusal)
    last = said.decode(errors="replace").strip().splitlines()[-1:] if code > 0 else []
    why = f"what reads it ended with {exit_words(code)}{''.join(f': {shorten(line)}' for line in last)}"
    raise UsageError(f"{where}: cannot be read: {why}. {REMEDY}")

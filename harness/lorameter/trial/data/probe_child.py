"""The process that looks into data for another (`lorameter.trial.data.probe`), within bounds; it answers by a line."""

from __future__ import annotations

import json
import sys
from typing import TextIO

from lorameter.errors import LorameterError, shorten
from lorameter.machine.rlimits import memory_limit
from lorameter.records import codec
from lorameter.studies.workload import Workload
from lorameter.trial.data.probe import REMEDY
from lorameter.trial.data.records import look_here

MEMORY_BYTES = 4 << 30
"""Beside what the libraries map; the first records take a hundredth of it."""


def answer(request: str) -> str:
    """What the process says that looks: a line of JSON with what was found, or with the refusal."""
    workload = codec.from_json(Workload, codec.parse(request), "what to look into")
    where = f"data {shorten(repr(workload.data))}"
    try:
        with memory_limit(MEMORY_BYTES):
            return json.dumps({"found": look_here(workload)})
    except LorameterError as error:
        return json.dumps({"error": str(error)})
    except MemoryError:
        why = f"its first records take more than {MEMORY_BYTES >> 30} GiB of memory"
    except RecursionError:
        why = "it is nested too deeply"
    return json.dumps({"error": f"{where}: cannot be read: {why}. {REMEDY}"})


def main(reply: TextIO) -> int:
    """Entry of the process that looks: a Workload as JSON on stdin, the answer in the reply."""
    reply.write(f"\n{answer(sys.stdin.read())}\n")
    return 0

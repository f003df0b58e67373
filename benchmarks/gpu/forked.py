"""Describes a zygote as the harness makes it: its threads, whether it may fork, and what its child can do.

It runs in a new process, since a process that already uses the device cannot show this, and prints one JSON document.

    python -m benchmarks.gpu.forked
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from lorameter.trial import zygote


def main() -> int:
    """Import the zygote's libraries, fork, and let the child print the findings of both."""
    zygote.import_libraries()
    found: dict[str, Any] = {"threads": threads(), "refuses_to_fork": zygote._cannot_fork()}
    pid = os.fork()
    if pid == 0:
        try:
            found["child"] = describe_child()
        except BaseException as error:
            traceback.print_exc()
            found["child"] = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        print(json.dumps(found | {"child": {"error": "the child ended without an answer"}}))
    return 0


def threads() -> list[str]:
    """Return the names of this process's threads."""
    return sorted((path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir())


def describe_child() -> dict[str, Any]:
    """Return the threads before and after the first use of the device, and every NVML counter with its value or
    reason."""
    import torch

    from lorameter.machine.nvml import open_device

    found: dict[str, Any] = {"threads": threads()}
    found["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    found["sum"] = torch.ones(8, device=found["device"]).sum().item()
    found["threads_with_device"] = threads()
    opened = open_device()
    if opened.value is None:
        return found | {"nvml": opened.reason}
    readings = opened.value.sample() | opened.value.facts()
    del readings["uuid"]
    opened.value.close()
    return found | {
        "known": {name: one.value for name, one in readings.items() if one.known},
        "missing": {name: one.reason for name, one in readings.items() if not one.known},
    }


if __name__ == "__main__":
    sys.exit(main())

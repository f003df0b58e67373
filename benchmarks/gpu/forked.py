"""Describes a zygote as the harness makes it: its threads, whether it may fork, and what its child can do.

It runs in a new process, since a process that already uses the device cannot show this, and prints one JSON document.

    python -m benchmarks.gpu.forked
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from lorameter.trial import zygote


def main() -> int:
    """Import the zygote's libraries, fork, and print the findings of parent and child."""
    begin = time.perf_counter()
    zygote.import_libraries()
    found: dict[str, Any] = {"import_s": time.perf_counter() - begin, "threads": threads()}
    found["refuses_to_fork"] = zygote._cannot_fork()
    begin = time.perf_counter()
    found["child"] = fork_child()
    found["child_s"] = time.perf_counter() - begin
    print(json.dumps(found))
    return 0


def threads() -> list[str]:
    """Return the names of this process's threads."""
    return sorted((path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir())


def fork_child() -> dict[str, Any]:
    """Fork a child and return its findings about the device and NVML."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            found = describe_child()
        except BaseException as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        text = answers.read()
    os.waitpid(pid, 0)
    return dict(json.loads(text)) if text else {"error": "the child ended without an answer"}


def describe_child() -> dict[str, Any]:
    """Return the time of the first use of the device, and every NVML counter with its value or reason."""
    import torch

    from lorameter.machine.nvml import open_device

    forked = threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()
    total = torch.ones(8, device=device).sum().item()
    started_s = time.perf_counter() - begin
    found: dict[str, Any] = {"device": device, "sum": total, "device_start_s": started_s}
    found |= {"threads": forked, "threads_with_device": threads()}
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

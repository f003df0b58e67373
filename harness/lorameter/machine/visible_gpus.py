"""Which GPUs a process may use, by CUDA_VISIBLE_DEVICES: what CUDA numbers from 0 is not what NVML numbers from 0.

Rules of the CUDA programming guide, appendix "CUDA environment variables": unset, every GPU; empty, none; else a list
of indices or UUIDs in the order in which CUDA numbers them, cut at the first entry that is not valid. A UUID may be
shortened to any unambiguous beginning. Measuring processes are started with CUDA_DEVICE_ORDER=PCI_BUS_ID
(`executors.local`), so an index means to them what it means to NVML, which counts along the bus as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

VARIABLE = "CUDA_VISIBLE_DEVICES"
ORDER_VARIABLE = "CUDA_DEVICE_ORDER"
BUS_ORDER = "PCI_BUS_ID"

_INDEX = re.compile(r"[0-9]{1,9}")
_UUID = re.compile(r"(GPU|MIG)-[0-9A-Za-z]")


def visible_devices(environment: Mapping[str, str]) -> tuple[int | str, ...] | None:
    """The entries that CUDA would accept, in its order: an index along the bus, or (the beginning of) a UUID.

    None where the variable is not set and nothing is hidden; an empty tuple where it hides every GPU.
    """
    listed = environment.get(VARIABLE)
    if listed is None:
        return None
    entries: list[int | str] = []
    for entry in (part.strip() for part in listed.split(",")):
        if _INDEX.fullmatch(entry):
            entries.append(int(entry))
        elif _UUID.match(entry):
            entries.append(entry)
        else:  # "-1" and whatever else is no device hides itself and all that follow
            break
    return tuple(entries) if len(set(entries)) == len(entries) else ()  # an entry given twice makes the list invalid


def counts_along_the_bus(environment: Mapping[str, str]) -> bool:
    """Whether CUDA numbers the GPUs of this environment as NVML does; by default it puts the fastest first."""
    return environment.get(ORDER_VARIABLE) == BUS_ORDER

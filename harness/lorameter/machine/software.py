"""What is installed where this process looks for it: no module is imported to be asked for its version."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from pathlib import Path


def normal_name(distribution: str) -> str:
    """A distribution's name as others are compared with it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def installed_packages() -> dict[str, str]:
    """Version of each distribution by its normal name; of several the first on the path, which an import would load."""
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions():
        metadata = one.metadata  # once: each look at it, `name` and `version` as well, reads and parses the file anew
        if name := metadata["Name"]:  # a half-removed distribution has no name
            found.setdefault(normal_name(name), metadata["Version"])
    return dict(sorted(found.items()))


def own_software(cuda: str | None) -> dict[str, str]:
    """The packages and the `python` of this process; `cuda` is what its torch was built for, None for none."""
    return installed_packages() | {"python": platform.python_version()} | ({"cuda": cuda} if cuda else {})


def cuda_of(torch: Path) -> str | None:
    """The CUDA version that the torch in this folder was built for, None for a CPU build."""
    with contextlib.suppress(OSError):
        for line in (torch / "version.py").read_text().splitlines():
            if line.startswith("cuda") and "'" in line:
                return line.split("'")[1]
    return None

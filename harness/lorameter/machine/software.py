"""The packages that are installed for this process, and those that determine a GPU's kernels.

Versions are read without importing modules. Torch chooses among the algorithms of cuDNN and cuBLAS, which are separate
packages and can be replaced without it, and both read the environment: `TORCH_CUDNN_SDPA_DEPRIORITIZED` takes attention
away from cuDNN, `NVIDIA_TF32_OVERRIDE` sets the format of all float32 products whatever a program asks for, and
`PYTORCH_ALLOC_CONF` (formerly of `CUDA` or `HIP`) how the allocator reserves. Two runs that differ in any of these are
not the same measurement.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KERNELS = "kernels"
"""Key of `kernel_libraries` in the provenance of a run on a GPU."""
MAIN_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
"""Libraries whose versions are shown with each run, and are columns of its tables."""
SWITCHES = re.compile(r"TORCH_CUDNN_SDPA_\w+|PYTORCH_(\w+_)?ALLOC_CONF|NVIDIA_TF32_OVERRIDE", re.ASCII)


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
        found = re.search(r"^cuda.*'(.+)'", (torch / "version.py").read_text(), re.MULTILINE)
        return found and found[1]
    return None


def switches_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that steer the choice of kernels, by name."""
    return {name: environment[name] for name in sorted(environment) if SWITCHES.fullmatch(name)}


def kernel_libraries(packages: Mapping[str, str], cuda: str | None, switches: Mapping[str, str]) -> dict[str, Any]:
    """Versions of the libraries that torch takes kernels from, None where they are not known, and the switches.

    Args:
        packages: distributions by their normal names, with their versions.
        cuda: the version that torch is built for; distributions of several may be installed side by side.
        switches: as of `switches_of`.
    """
    of = f"-cu{cuda.partition('.')[0]}" if cuda else ""
    versions = {
        library: packages.get(f"nvidia-{library}{of}", packages.get(f"nvidia-{library}"))
        for library in ("cudnn", "cublas")
    }
    return {**versions, "switches": dict(switches)}

"""The packages installed for this process, and the packages that determine a GPU's kernels.

Versions are read without importing modules. torch chooses among the algorithms of cuDNN and cuBLAS, which are separate
packages that can be replaced independently, and both read the environment: `TORCH_CUDNN_SDPA_DEPRIORITIZED` makes
torch prefer other attention kernels, `NVIDIA_TF32_OVERRIDE` overrides the format of all float32 products, and
`PYTORCH_ALLOC_CONF` (formerly `PYTORCH_CUDA_ALLOC_CONF` and `PYTORCH_HIP_ALLOC_CONF`) controls how the allocator
reserves memory. Two runs that differ in any of these are different measurements.
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
    """A distribution's normalised name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def installed_packages() -> dict[str, str]:
    """Version of each distribution by its normalised name; if there are several, the first on the path, which an import
    would load."""
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions():
        metadata = one.metadata  # once: each access, also through `name` and `version`, reads and parses the file again
        if name := metadata["Name"]:  # a half-removed distribution has no name
            found.setdefault(normal_name(name), metadata["Version"])
    return dict(sorted(found.items()))


def own_software(cuda: str | None) -> dict[str, str]:
    """The packages and the `python` of this process; `cuda` is the CUDA version of its torch, or None."""
    return installed_packages() | {"python": platform.python_version()} | ({"cuda": cuda} if cuda else {})


def cuda_of(torch: Path) -> str | None:
    """The CUDA version for which the torch in this folder was built, None for a CPU build."""
    with contextlib.suppress(OSError):
        found = re.search(r"^cuda.*'(.+)'", (torch / "version.py").read_text(), re.MULTILINE)
        return found and found[1]
    return None


def switches_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that affect the choice of kernels, by name."""
    return {name: environment[name] for name in sorted(environment) if SWITCHES.fullmatch(name)}


def kernel_libraries(packages: Mapping[str, str], cuda: str | None, switches: Mapping[str, str]) -> dict[str, Any]:
    """Versions of the libraries that provide torch's kernels, None if unknown, and the switches.

    Args:
        packages: versions of distributions by their normalised names.
        cuda: the CUDA version of torch; distributions for several versions may be installed.
        switches: the result of `switches_of`.
    """
    of = f"-cu{cuda.partition('.')[0]}" if cuda else ""
    versions = {
        library: packages.get(f"nvidia-{library}{of}", packages.get(f"nvidia-{library}"))
        for library in ("cudnn", "cublas")
    }
    return {**versions, "switches": dict(switches)}

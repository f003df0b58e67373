"""What decides, in addition to torch's version, which kernels a GPU is given, and how its memory is held.

Torch chooses among the algorithms of cuDNN and cuBLAS, which are separate packages and can be replaced without it, and
both read the environment: `TORCH_CUDNN_SDPA_DEPRIORITIZED` takes attention away from cuDNN, `NVIDIA_TF32_OVERRIDE` sets
the format of all float32 products whatever a program asks for, and `PYTORCH_ALLOC_CONF` (formerly of `CUDA` or `HIP`)
how the allocator reserves. Two runs that differ in any of these are not the same measurement.

The versions are those of the distributions that torch is installed with; of a torch that brought its libraries along in
another way they are not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FIELD = "kernels"
"""Its key in the provenance of a run on a GPU."""
SWITCHES = re.compile(r"TORCH_CUDNN_SDPA_\w+|PYTORCH_(\w+_)?ALLOC_CONF|NVIDIA_TF32_OVERRIDE", re.ASCII)
_LIBRARIES = ("cudnn", "cublas")


def switches_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that steer the choice, by name."""
    return {name: environment[name] for name in sorted(environment) if SWITCHES.fullmatch(name)}


def steering(packages: Mapping[str, str], cuda: str | None, switches: Mapping[str, str]) -> dict[str, Any]:
    """Versions of the libraries, None where they are not known, and the switches.

    Args:
        packages: distributions by their normalised names, with their versions.
        cuda: the version that torch is built for; distributions of several may be installed side by side.
        switches: as of `switches_of`.
    """
    of = f"-cu{cuda.partition('.')[0]}" if cuda else ""
    versions = {one: packages.get(f"nvidia-{one}{of}", packages.get(f"nvidia-{one}")) for one in _LIBRARIES}
    return {**versions, "switches": dict(switches)}

"""Another GPU: by its name, or by how much memory it has.

A vendor's "24 GB" is 24 GiB of chips. What a process can have of them is less: ECC may take its share before the driver
shows anything (`lorameter.models.costs.peaks`), the driver keeps some of what it shows, and CUDA's context and
libraries take some of the rest. The last two were measured on no GPU by this project, so they are assumptions, and are
called so wherever they are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lorameter.errors import UsageError, shorten
from lorameter.models.costs.peaks import DEVICES, MEMORY_SOURCE, DevicePeaks

DRIVER_SHARE = 0.02
"""Of what nvidia-smi shows, what no process can have. torch's messages of an out-of-memory call 23.52 to 23.68 GiB the
total of an RTX 4090 (23.99 shown), 31.36 that of an RTX 5090 (31.84), 44.42 that of an L40S (44.99): 1.3 to 2.0 % less
(issues of Soul-AILab/SoulX-FlashTalk, zai-org/CogVideo, TrajectoryCrafter/TrajectoryCrafter and stepfun-ai/
Step-Video-T2V)."""
DRIVER_SOURCE = "torch's messages of an out-of-memory show 1.3 to 2.0 % less than nvidia-smi"
UNITS = {
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_MEMORY = re.compile(r"\d{1,3}(?:gb|gib)?", re.ASCII)
_REMEDY = "Give a size with its unit, as 24GiB or 24GB (of 10^9 bytes)"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """A GPU to estimate for."""

    name: str
    """As it was asked for where it is a size, else as people call it."""
    device_name: str
    """As NVML gives it; "" where only a size is known."""
    total_bytes: int
    """All that nvidia-smi shows, or would."""
    source: str
    """Where that is from."""

    @property
    def usable_bytes(self) -> int:
        """What processes can have of it: an assumption (`DRIVER_SHARE`)."""
        return int(self.total_bytes * (1 - DRIVER_SHARE))


def find_card(text: str) -> GpuSpec:
    """The GPU that `--gpu` asks for: a size with its unit, or a name of `lorameter.models.costs.peaks.DEVICES`.

    A name is found by its words: "H100", "RTX 4090", "4090", "A100 80GB", or whole, as nvidia-smi prints it. A relative
    of a listed GPU (an A10G, a laptop's RTX 4090) is another GPU.

    Raises:
        UsageError: neither a size nor a name, or a name that GPUs of different memory share.
    """
    size = _SIZE.fullmatch(text.strip())
    if size is not None and size[2].lower() in UNITS:
        total = int(float(size[1]) * UNITS[size[2].lower()])
        if not total:
            raise UsageError(f"--gpu {_quoted(text)}: no memory. {_REMEDY}.")
        return GpuSpec(name=" ".join(text.split()), device_name="", total_bytes=total, source="as given")
    found = [device for device in DEVICES if _is_called(device, text)]
    if not found:
        why = "a size without a known unit" if size is not None else "no known GPU"
        raise UsageError(f"--gpu {_quoted(text)}: {why}. Known: {_list(DEVICES)}. {_REMEDY}, for any other.")
    if len({device.memory_mib for device in found}) > 1:
        raise UsageError(f"--gpu {_quoted(text)}: there are several, of different memory. Name one: {_list(found)}.")
    return GpuSpec(
        name=found[0].label, device_name=found[0].names[0], total_bytes=found[0].memory_bytes, source=MEMORY_SOURCE
    )


def _quoted(text: str) -> str:
    return shorten(repr(text), 60)


def _list(devices: Iterable[DevicePeaks]) -> str:
    return ", ".join(dict.fromkeys(device.label for device in devices))


def _is_called(device: DevicePeaks, text: str) -> bool:
    """Whether all words of the text are among those of one of its names; its memory alone names no GPU."""
    asked = _words(text)
    memory = {f"{device.sold_gb}{unit}" for unit in ("", "gb", "gib")}
    if all(_MEMORY.fullmatch(word) for word in asked):
        return False
    return any(asked <= _words(name) | memory for name in device.names)


def _words(text: str) -> set[str]:
    apart = re.sub(r"\b(rtx|geforce)(?=\d)", r"\1 ", text.lower())
    return set(re.findall(r"[\w.+]+", apart)) - {"nvidia", "tesla"}

"""The options `on` and `sites` of a study or a command line: where replicates are measured.

They are parsed and validated here, on any machine. `lorameter.run.sites` checks that the GPU, cluster or queue exists.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorameter.errors import UsageError, require

HERE = "here"
RAY = "ray"
SLURM = "slurm"
SLURM_OPTIONS: Mapping[str, type] = {
    "partition": str, "account": str, "qos": str, "reservation": str, "constraint": str, "nodelist": str,
    "exclude": str, "gres": str, "gpus_per_node": int, "cpus_per_task": int, "mem": str, "time": int, "comment": str,
    "exclusive": str,
}  # fmt: skip
"""Options that are passed to sbatch, by sbatch's names."""
OWN_OPTIONS: Mapping[str, type] = {"sites": int}


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmRequest:
    """The SLURM jobs that a value of `on` requests."""

    on: str
    sites: int = 1
    """Number of jobs in the queue at a time."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Options passed on to sbatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSpec:
    """The options as given. Raises `UsageError` for invalid options."""

    on: str = HERE
    sites: tuple[str, ...] = ()
    mixed: bool = False
    """Whether sites may be different machines."""

    def __post_init__(self) -> None:
        if is_slurm(self.on):
            read_slurm(self.on)
            require(
                not self.sites, f"{say_on(self.on)}: its jobs are the sites. Write sites=N in it, and leave sites out."
            )
        elif self.on == HERE:
            require(
                all(map(_NUMBERS.fullmatch, self.sites)),
                f"{say_sites(self.sites)}: numbers with commas between them are expected. Write 0,1 for two sites, or "
                'sites = ["0", "1"] in [protocol]; 0+1,2+3 for two of two GPUs each, where trials have two ranks.',
            )
            require(
                not self.mixed or len(self.sites) > 1,
                "mixed: there is one site here, which is like itself. Name several by sites, or take it out.",
            )
        else:
            require(
                self.on == RAY or self.on.startswith(f"{RAY}://"),
                f"{say_on(self.on)}: not known. Use {HERE}, {RAY}, {RAY}://HOST:PORT of a cluster's client port, or "
                f"{SLURM}:KEY=VALUE,….",
            )
        named = [number for name in self.sites for number in numbers_of(name)] if self.on == HERE else self.sites
        require(
            all(self.sites) and len(set(named)) == len(named),
            f"{say_sites(self.sites)}: one is named twice, or has no name, and would disturb itself. Name each once.",
        )

    @property
    def is_plain(self) -> bool:
        """Whether neither option is given: one device of this machine, or all CPUs."""
        return self.on == HERE and not self.sites

    @property
    def said(self) -> str:
        """The option that selects the place, for messages."""
        return say_sites(self.sites) if self.on == HERE else say_on(self.on)

    def with_options(self, *, on: str | None = None, sites: str | None = None, mixed: bool = False) -> SiteSpec:
        """The options with those of a command line added; None and False leave an option unchanged.

        `sites` are comma-separated names. They and `mixed` belong to one value of `on`, so another `on` clears them.
        """
        of_place = (self.on, self.sites, self.mixed) if on is None else (on, (), False)
        named = of_place[1] if sites is None else tuple(part.strip() for part in sites.split(","))
        return SiteSpec(on=of_place[0], sites=named, mixed=of_place[2] or mixed)


_NUMBERS = re.compile(r"[0-9]{1,4}(\+[0-9]{1,4})*")
"""Name of a site on this machine: a GPU, or the GPUs of a trial with several ranks."""


def numbers_of(name: str) -> tuple[int, ...]:
    """The GPU numbers of this machine, or CPU shares, that form one site: "0", or "0+1"."""
    return tuple(map(int, name.split("+")))


def say_sites(sites: Sequence[str]) -> str:
    """The sites as text, for messages."""
    return f"sites = {','.join(sites)!r}"


def say_on(on: str) -> str:
    """The value of `on` as text, for messages."""
    return f"on = {on!r}"


def is_slurm(on: str) -> bool:
    """Whether a value of `on` names SLURM jobs."""
    return on.partition(":")[0] == SLURM


def read_slurm(on: str) -> SlurmRequest:
    """The jobs requested by a text such as "slurm:sites=4,partition=gpu,gres=gpu:1,time=60".

    A value may contain commas: a part without "=" belongs to the value before it.

    Raises:
        UsageError: a key is unknown, or a value is invalid.
    """
    listed = on.partition(":")[2]
    known = {**OWN_OPTIONS, **SLURM_OPTIONS}
    found: dict[str, Any] = {}
    for part in re.split(r",(?=[^,=]*=)", listed) if listed else ():
        key, equals, text = part.partition("=")
        expected = f"Use KEY=VALUE of {', '.join(known)}."
        require(key in known and equals, f"{say_on(on)}: {key!r} is not known. {expected}")
        require(key not in found, f"{say_on(on)}: {key} is given twice. Give it once.")
        found[key] = _read(on, key, text, known[key])
    sites = found.pop("sites", 1)
    require(0 < sites < 1000, f"{say_on(on)}: sites={sites}: 1 to 999 are possible.")
    return SlurmRequest(on=on, sites=sites, parameters=found)


def _read(on: str, key: str, text: str, kind: type) -> Any:
    if kind is str and text and text.isprintable():
        return text
    if kind is not str and text.isascii():
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if 0 < value < 1e6:
                return value
    raise UsageError(f"{say_on(on)}: {key}={text!r}: a {'text' if kind is str else 'positive number'} is expected.")

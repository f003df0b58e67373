"""Where a command measures when `--on` names a cluster: its sites, described and alike, before anything is planned."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.records.record import Notice
    from harness.run.device import IfBusy
    from harness.run.sites.remote import RemoteStation
    from harness.studies.study import Study

RAY = "ray"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The sites of a cluster; none where a command measures on its own machine."""

    stations: tuple[RemoteStation, ...] = ()
    notices: tuple[Notice, ...] = ()

    @property
    def free_bytes(self) -> int | None:
        """On the site that has least; None where it cannot be known."""
        from harness.run.sites.remote import free_bytes_of

        return free_bytes_of(self.stations)

    def check(self, study: Study, on: str) -> None:
        """Raises `UsageError` for a study that cannot be spread."""
        from harness.run.sites.local import check_spreadable

        check_spreadable(study, f"--on {on}")

    @contextlib.contextmanager
    def hold(self, if_busy: IfBusy) -> Iterator[bool]:
        """Meanwhile nobody else measures on its devices; says whether somebody had to be waited for."""
        from harness.run.device import tell_stderr
        from harness.run.sites.remote import hold_all

        yield hold_all(self.stations, if_busy, tell_stderr)


@contextlib.contextmanager
def open_cluster(options: argparse.Namespace) -> Iterator[Cluster]:
    """The cluster that `--on` names, with the nodes of `--sites` if it is given.

    Raises:
        UsageError: no such cluster, or no such node.
        InvalidRunError: a node that does not answer, or is unlike the others.
    """
    if not options.on:
        yield Cluster()
        return
    if options.on != RAY and not options.on.startswith(f"{RAY}://"):
        raise UsageError(f"--on {options.on}: not known. Use ray, or ray://HOST:PORT of a cluster's client port.")
    from harness.run.sites.ray import open_stations
    from harness.run.sites.remote import describe_all

    wanted = [name.strip() for name in options.sites.split(",")] if options.sites else []
    with open_stations(options.on, wanted) as stations:
        yield Cluster(stations=stations, notices=describe_all(stations))

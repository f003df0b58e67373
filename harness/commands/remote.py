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
    from harness.run.sites.joining import Arrivals
    from harness.run.sites.remote import RemoteStation
    from harness.studies.study import Study

RAY = "ray"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The sites of a cluster; none where a command measures on its own machine."""

    stations: tuple[RemoteStation, ...] = ()
    notices: tuple[Notice, ...] = ()
    arrivals: Arrivals | None = None
    """Where other sites may come from while these measure."""

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

        if self.arrivals is not None:
            self.arrivals.if_busy = if_busy
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
    from harness.run.sites.batch import is_batch, read_asked
    from harness.run.sites.remote import describe_all, those_that_answer

    if is_batch(options.on):
        from harness.records import store
        from harness.run.sites.batch import check_here
        from harness.run.sites.slurm import open_jobs
        from harness.studies.study_file import load_study

        asked = read_asked(options.on)
        if options.sites:
            raise UsageError(f"--on {options.on}: its jobs are the sites. Write sites=N in it, and leave --sites out.")
        check_here(asked)
        if options.study:
            load_study(options.study)  # what cannot be read is refused before anything waits in a queue
        with open_jobs(asked, store.runs_dir(options.runs_dir, make=True)) as (found, notices, jobs):
            lost: list[Notice] = []
            found = those_that_answer(found, lost)
            yield Cluster(stations=tuple(found), notices=(*notices, *lost, *describe_all(found)), arrivals=jobs)
        return
    if options.on != RAY and not options.on.startswith(f"{RAY}://"):
        raise UsageError(
            f"--on {options.on}: not known. Use ray, ray://HOST:PORT of a cluster's client port, slurm:KEY=VALUE,… or "
            "submitit-local."
        )
    from harness.run.sites.ray import open_stations

    wanted = [name.strip() for name in options.sites.split(",")] if options.sites else []
    with open_stations(options.on, wanted) as stations:
        yield Cluster(stations=stations, notices=describe_all(stations))

"""What must be known of a run to read its records and to repeat it: written before its first trial, and how it ended
after its last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorameter.errors import UsageError
from lorameter.records import bounded_io, codec
from lorameter.records.record import SCHEMA, Notice, require_readable
from lorameter.records.time_breakdown import TimeBreakdown
from lorameter.records.validation import check_manifest
from lorameter.records.worker_info import BaseSummary

RunStatus = Literal["running", "complete", "interrupted", "failed"]
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """One time that a run which had broken off was resumed."""

    unix_s: float
    harness: str | None
    """Version and content of the harness that went on (`provenance.harness_identity`)."""
    commit: str | None
    """That of the repository one stood in."""
    max_minutes: float | None = None
    """The limit of time from then on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """What a site is that replicates were measured on."""

    machine: dict[str, Any]
    """Of the provenance what is the machine's (`provenance.Machine`)."""
    fingerprint: str
    """What the run's would be if it had been measured there alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What must be known to read the records of a run and to repeat it."""

    schema: int = SCHEMA
    run: str
    study: dict[str, Any]
    phases: tuple[str, ...]
    sites: tuple[str, ...] = field(default=(), metadata=codec.LATER)  # that may be unlike: each is judged by itself
    selection: tuple[str, ...] = ()
    """Names of the variants that are measured; empty for all of the study."""
    own_workloads: dict[str, Any] = field(default_factory=dict)
    """What variants are measured on that are not measured on the study's workload, by name."""
    interleaving: str
    why: str = ""
    """Why this interleaving."""
    order: tuple[str, ...]
    """Trial ids in the order of the plan; those of replicates that turned out needless are taken off at the end."""
    seed: int
    created_unix_s: float
    provenance: dict[str, Any]
    fingerprint: str
    """Hash of the provenance fields that must agree for two runs to be compared."""
    tokens: dict[str, Any] = field(default_factory=dict)
    bases: tuple[BaseSummary, ...] = field(default=(), metadata=codec.LATER)
    """What the trials stand on, prepared once; of each time that the run was resumed."""
    notices: tuple[Notice, ...] = ()
    """What was known of the study before it ran."""
    sides: dict[str, Any] = field(default_factory=dict)
    """For an A/B: what stands on either side, and with which versions."""
    policy: dict[str, Any] = field(default_factory=dict, metadata=codec.LATER)
    """For an A/B: the policy that it was measured to be judged by; empty for the defaults."""
    site_facts: dict[str, SiteFacts] = field(default_factory=dict, metadata=codec.LATER)
    """Of a run that was spread: where each of its sites is; those of every time that it was resumed."""
    stopped: str | None = None
    """Why the run ended before the replicates of its plan were used up."""
    resumed: tuple[Resumption, ...] = ()
    spending: TimeBreakdown | None = field(default=None, metadata=codec.LATER)
    """What the time of its last invocation went to."""
    skipped: tuple[str, ...] = field(default=(), metadata=codec.LATER)
    """What was not measured because of the time limit: requests, open_ended, merged, cold."""
    status: RunStatus = "running"
    """"running" also says a manifest whose process was killed; see `Run.live`."""


def read_manifest(path: Path) -> Manifest:
    """The manifest of a run directory.

    Raises:
        UsageError: it is damaged or of another schema.
    """
    source = path / MANIFEST
    try:
        data = bounded_io.read_json(source, bounded_io.MANIFEST_BYTES)
        require_readable(data, source)
        codec.dumps(data).encode()  # what could not be written again would only fail later
    except (bounded_io.NotReadableError, codec.NotJsonError, UnicodeError) as error:
        raise UsageError(f"{source}: cannot be read: {error}. Measure again, or restore the file.") from None
    manifest = codec.from_json(Manifest, data, source.name)
    check_manifest(manifest, source.name)
    return manifest

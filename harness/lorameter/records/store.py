"""Stores runs: one directory per run. Records are appended and synced one by one; only the manifest is rewritten.

RUN/manifest.json    the plan, the machine and the versions; written before the first trial, updated at the end
RUN/trials.jsonl     one TrialRecord per line, fsynced after each; the last record of a trial counts. Its `checks`
                     are hashes of lines of checks.jsonl
RUN/checks.jsonl     the results of all checks, each result once, with its hash; fsynced before the record
RUN/trials.jsonl.lock      held by the process that writes; released if the process is killed
RUN/steps.jsonl      the steps of a training script, which are added to its record; removed when the run has ended
RUN/logs/            the output of each trial
RUN/tokens-*.safetensors   the token stream that all trials trained on
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import secrets
import shutil
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

import msgspec

from lorameter.errors import UsageError, require
from lorameter.records import codec, fileio
from lorameter.records.codec import NotReadableError
from lorameter.records.fileio import hold_lock, is_locked, scratch_folder, write_document, write_whole
from lorameter.records.os_errors import MACHINE_ERRORS, translate_os_errors, translate_write_errors
from lorameter.records.record import SCHEMA, BaseSummary, Example, Line, Notice, TrialRecord, UnixTime, require_readable
from lorameter.records.trials import CHECKS, STEPS, EvidenceFile, add_steps, encode_record, read_trials
from lorameter.records.trials import TRIALS as TRIALS

RunStatus = Literal["running", "complete", "interrupted", "failed"]
MANIFEST = "manifest.json"
ENV_RUNS = "LORAMETER_RUNS"


class TimeBreakdown(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one invocation."""

    wall_s: float
    """From the start, including the preparation of tokens and bases, to the end of the last trial."""
    limit_s: float | None = None
    """Its time limit."""
    measured_s: dict[str, float] = msgspec.field(default_factory=dict)
    """Seconds in which only timed work ran, by its kind: steps, requests, open_ended, merged, cold."""
    turns: tuple[int, ...] = ()
    """Turns of each trial, by replicate, if time was limited."""

    @property
    def share(self) -> float:
        """Share of the time that was measurement."""
        return sum(self.measured_s.values()) / self.wall_s if self.wall_s else 0.0


class Resumption(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One resumption of an interrupted run."""

    unix_s: UnixTime
    harness: str | None
    """Version and content of the harness that resumed the run (`provenance.harness_identity`)."""
    commit: str | None
    """Commit of the repository of the working folder."""
    max_minutes: float | None = None
    """The time limit from then on."""


class SiteFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Facts about a site on which replicates were measured."""

    machine: dict[str, Any]
    """The part of the provenance that describes the machine (`provenance.Machine`)."""
    fingerprint: str
    """The fingerprint that the run would have if it had been measured only on this site."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The data needed to read the records of a run and to repeat it."""

    schema: int = SCHEMA
    run: Line
    study: dict[str, Any]
    phases: tuple[str, ...]
    sites: tuple[str, ...] = ()  # sites may differ: each is judged separately
    selection: tuple[str, ...] = ()
    """Names of the variants that are measured; empty for all of the study."""
    own_workloads: dict[str, Any] = msgspec.field(default_factory=dict)
    """Workloads of variants that are not measured on the study's workload, by variant name."""
    interleaving: str
    why: str = ""
    """The reason for this interleaving."""
    order: tuple[Line, ...]
    """Trial ids in the order of the plan; ids of replicates that were not needed are removed at the end."""
    seed: int
    created_unix_s: UnixTime
    provenance: dict[str, Any]
    fingerprint: str
    """Hash of the provenance fields that must agree for two runs to be compared."""
    tokens: dict[str, Any] = msgspec.field(default_factory=dict)
    bases: tuple[BaseSummary, ...] = ()
    """The bases of the trials, prepared once for each invocation."""
    notices: tuple[Notice, ...] = ()
    """Findings about the study before it ran."""
    sides: dict[str, Any] = msgspec.field(default_factory=dict)
    """For an A/B: each side and its versions."""
    policy: dict[str, Any] = msgspec.field(default_factory=dict)
    """For an A/B: the policy under which it was measured; empty for the defaults."""
    site_facts: dict[str, SiteFacts] = msgspec.field(default_factory=dict)
    """For a run on several sites: the facts about each site, of all invocations."""
    stopped: str | None = None
    """Why the run ended before all replicates of its plan were measured."""
    resumed: tuple[Resumption, ...] = ()
    spending: TimeBreakdown | None = None
    """How the time of the last invocation was spent."""
    skipped: tuple[str, ...] = ()
    """Parts that the time limit left out: requests, open_ended, merged, cold."""
    status: RunStatus = "running"
    """The manifest of a killed process also says "running"; see `Run.live`."""


# Tables of a manifest without a fixed set of keys: the types of the keys that readers rely on.
_VERSIONS, _TABLE = ("libraries", "packages", "engine"), ("settings", "worker", "kernels")
_GIT = msgspec.defstruct("git", [("commit", str | None, None), ("dirty", bool | None, None)])
_PROVENANCE = msgspec.defstruct(
    "provenance",
    [("git", _GIT | None, None), *((name, dict[str, str | None], {}) for name in _VERSIONS),
     *((name, dict[str, Any], {}) for name in _TABLE)],
)  # fmt: skip
_COUNTS = [(name, int, 0) for name in ("real_tokens", "padded_tokens", "without_loss")]
_OWN = msgspec.defstruct("own", [*_COUNTS, ("examples", tuple[Example, ...], ())])
_TOKENS = msgspec.defstruct("tokens", [("own", dict[str, _OWN], {})], bases=(_OWN,))  # type: ignore[valid-type]
_SIDE = msgspec.defstruct("side", [("label", str), ("slowdown_rows", int, 0), ("facts", _PROVENANCE | None, None)])
_TABLES = msgspec.defstruct(
    "manifest",
    [("provenance", _PROVENANCE), ("tokens", _TOKENS | None, None), ("sides", dict[str, _SIDE], {})],  # type: ignore[valid-type]
)


def read_manifest(path: Path, check: Callable[[BinaryIO], object] = lambda file: None) -> Manifest:
    """The manifest of a run directory; `check` receives the open file first.

    Raises:
        UsageError: it is damaged or of another schema.
    """
    source = path / MANIFEST
    try:
        data = fileio.read_json(source, check)
        require_readable(data, source)
        msgspec.convert(data, _TABLES, strict=False)
        codec.dumps(data).encode()  # a manifest that cannot be written again would only fail later
    except (NotReadableError, UnicodeError, msgspec.ValidationError) as error:
        raise UsageError(f"{source}: cannot be read: {error}. Measure again, or restore the file.") from None
    manifest = codec.from_json(Manifest, data, source.name)
    if manifest.sides and manifest.sides.keys() != {"base", "candidate"}:
        raise UsageError(f"{source}: sides = {', '.join(manifest.sides)}: base and candidate are expected. Restore it.")
    return manifest


def runs_dir(folder: str | Path | None, *, make: bool = False) -> Path:
    """`--runs-dir`, else $LORAMETER_RUNS, else ./.lorameter/runs; created if missing and `make` is set."""
    named = folder or os.environ.get(ENV_RUNS)
    path = Path(named or Path(".lorameter") / "runs")
    if not make and (fileio.is_folder(path) or not fileio.is_there(path)):
        return path
    with translate_write_errors(f"runs directory {path}", "Give another with --runs-dir.", done="made"):
        path.mkdir(parents=True, exist_ok=True)
        ignored = path.parent / ".gitignore"
        if not named and not (ignored.exists() and ignored.stat().st_size):
            write_whole(ignored, "# made by lorameter\n*\n")  # else runs would make the user's repository dirty
    return path


def new_run_id(name: str, folder: Path) -> str:
    """A new id that sorts by time and is unique in the folder, even if the clock is wrong:
    20260131-093000-study-a1b2."""
    while fileio.is_there(folder / (run := f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{secrets.token_hex(2)}")):
        pass
    return run


class RunWriter:
    """Appends to one run. Raises `InvalidRunError` if writing fails; what was written before stays intact."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.path = folder / manifest.run
        self._manifest = manifest
        with self.refusals():
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
        self._evidence = EvidenceFile(self.path)
        self._write_manifest()

    def append(self, record: TrialRecord) -> None:
        """Write the new evidence and then the record, and wait until both are on disk."""
        with self.refusals():
            fileio.append(self.path / TRIALS, encode_record(record, self._evidence.add(record.checks)))

    def finish_with(self, record: TrialRecord) -> None:
        """Write the last record of a run with one trial, and write its status."""
        self.append(record)
        self.finish("complete" if record.settled else "interrupted")

    def finish(
        self,
        status: RunStatus,
        *,
        stopped: str | None = None,
        measured: Sequence[str] | None = None,
        notices: Sequence[Notice] = (),
        new_sites: Mapping[str, SiteFacts] | None = None,
        spending: TimeBreakdown | None = None,
        skipped: Sequence[str] = (),
    ) -> None:
        """Write the final state: `measured` are the trials of a run that ended before all replicates, `notices` those
        found during the run, `new_sites` those that joined it, `spending` how the time was spent, `skipped` the parts
        that the time limit left out."""
        self._manifest = msgspec.structs.replace(
            self._manifest,
            status=status,
            stopped=stopped,
            order=self._manifest.order if measured is None else tuple(measured),
            notices=(*self._manifest.notices, *notices),
            site_facts={**self._manifest.site_facts, **(new_sites or {})},
            spending=spending or self._manifest.spending,
            skipped=tuple(skipped) or self._manifest.skipped,
        )
        self._write_manifest()
        with self.refusals():
            (self.path / STEPS).unlink(missing_ok=True)  # the record has them

    def _write_manifest(self) -> None:
        with self.refusals():
            write_document(self.path / MANIFEST, self._manifest, mode=0o644)  # --resume executes its commands

    def refusals(self) -> contextlib.AbstractContextManager[None]:
        """Convert an OSError into an `InvalidRunError` that explains the consequence for this run."""
        return translate_os_errors(lambda: describe_failed_write(self.path))


CHECKPOINT_S = 30.0
"""Minimum seconds between two checkpoints."""
CHECKPOINT_SHARE = 0.1
"""Minimum time between two checkpoints as a share of all the time, so that their number, and their size on disk, grows
with the logarithm of the time."""


def checkpoint_is_due(now_s: float, *, begun_s: float, saved_s: float) -> bool:
    """Whether to save now an incomplete result that began at `begun_s` and was last saved at `saved_s`. A sync takes
    milliseconds, and repeating a shorter stretch costs little."""
    return now_s - saved_s >= max(CHECKPOINT_S, CHECKPOINT_SHARE * (now_s - begun_s))


def describe_failed_write(path: Path) -> tuple[str, str]:
    """What a failed write means for the run of this directory, and what to do once its cause is removed."""
    if not (path / MANIFEST).is_file():
        return f"run {path.name} could not be started, or its folder was removed", ""
    effect = f"run {path.name} ended early; its measurements are kept"
    return effect, f"resume: lorameter run --resume {path.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run read from disk."""

    path: Path
    manifest: Manifest
    records: tuple[TrialRecord, ...]
    """The last record of each trial, in the order of the plan."""
    damaged_lines: int = 0
    """Lines that a crash truncated or whose evidence is lost; their trials count as not run."""
    measured_again: int = 0
    """Trials that were started more than once because the measuring process ended too early."""
    disturbed: tuple[TrialRecord, ...] = ()
    """Earlier measurements of trials that were measured again because of a disturbance."""
    live: bool = False
    """Whether a process is writing the run at present."""

    @property
    def state(self) -> RunStatus | Literal["killed"]:
        """Its status, or "killed" if its process ended without writing a status."""
        return "killed" if self.manifest.status == "running" and not self.live else self.manifest.status


def read_run(name: str, folder: Path) -> Run:
    """A run by id (in `folder`), by directory, or by a file that `lorameter pack` made.

    Args:
        name: id or path of the run.
        folder: the folder in which ids are looked up.

    Raises:
        UsageError: no such run, or one written by another schema.
    """
    for place in (Path(name), folder / name):
        if is_packed(place):
            with unpacked(place) as inside:
                return dataclasses.replace(_read(inside, place.name, folder), path=place)
    path = Path(name) if fileio.is_file(Path(name) / MANIFEST) else folder / name
    return _read(path, name, folder)


def _read(path: Path, name: str, folder: Path) -> Run:
    source = path / MANIFEST
    if not fileio.is_file(source):
        for test, what in ((fileio.is_folder, f"a folder without {MANIFEST}"), (fileio.is_file, "damaged, or no run")):
            require(not (test(name) or test(path)), f"run {name!r}: it is {what}. {_ASK_AGAIN}")
        known = ", ".join(run.name for run in list_runs(folder)[-3:]) or "none yet"
        raise UsageError(f"run {name!r}: not found in {folder}. Latest runs: {known}.")
    manifest = read_manifest(path)
    collects = gc.isenabled()
    gc.disable()  # records have no reference cycles, and collections during a large run take as long as the reading
    try:
        found = read_trials(path, name)
    finally:
        if collects:
            gc.enable()
    records = [one for one in found if one is not None]
    damaged_lines = len(found) - len(records)
    latest = _latest(records, manifest)
    if manifest.resumed and {record.trial for record in latest if record.settled} >= set(manifest.order):
        damaged_lines = 0  # the trials of damaged lines have been measured again
    counted = {record.trial: record for record in latest}
    return Run(
        path=path,
        manifest=manifest,
        records=tuple(add_steps(record, path) if record.under_way else record for record in latest),
        damaged_lines=damaged_lines,
        measured_again=_measured_again(records),
        disturbed=tuple(record for record in records if record.disturbed and record != counted.get(record.trial)),
        live=is_live(path, manifest),
    )


def _latest(records: Sequence[TrialRecord], manifest: Manifest) -> tuple[TrialRecord, ...]:
    """The last record of each trial that ended, else its last record. Trials of unneeded replicates are left out if
    they were given up."""
    planned = set(manifest.order)
    ended = {record.trial: record for record in records if record.settled}
    last = {
        record.trial: ended.get(record.trial, record) for record in records if record.settled or record.trial in planned
    }
    return tuple(sorted(last.values(), key=lambda record: record.position))


def _measured_again(records: Sequence[TrialRecord]) -> int:
    """Trials with records from more than one start of the same attempt. One start can have several records, because a
    trial is also saved while it is running."""
    starts = {(record.trial, record.attempt, record.started_unix_s) for record in records if record.status != "not_run"}
    counts = Counter((trial, attempt) for trial, attempt, _ in starts)
    return len({trial for (trial, _), count in counts.items() if count > 1})


def is_live(path: Path, manifest: Manifest) -> bool:
    """Whether a process is writing the run in this directory at present."""
    return manifest.status == "running" and is_locked(path / TRIALS)


def lock_run(path: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the run in this directory, which is made if needed, for writing. Raises `UsageError` if another process
    holds it."""
    path.mkdir(mode=0o755, parents=True, exist_ok=True)  # with any umask, only its owner replaces files in it

    def refuse(message: str) -> NoReturn:
        raise UsageError(message)

    return hold_lock(path / TRIALS, refusal_while_live(path), refuse)


def refusal_while_live(path: Path) -> str:
    """The error message for a second process that would write the run in this directory."""
    return (
        f"run {path.name}: another process is measuring it, and two would disturb each other and mix their records. "
        "Wait for it, or end it; then resume --resume."
    )


def list_runs(folder: Path) -> list[Path]:
    """Directories of runs, oldest first; on every Python version, they include runs whose manifest is a broken link."""
    return sorted(path for path in folder.glob("*") if is_run(path))


def latest_run(folder: Path) -> str:
    """The id of the newest run in a folder. Raises `UsageError` if there is none."""
    runs = list_runs(folder)
    require(runs, f"no run in {folder}. Measure one (`lorameter run`), or name one, or another --runs-dir.")
    return runs[-1].name


def is_run(path: Path) -> bool:
    """Whether the directory contains a run; another process may have removed it since it was listed."""
    return os.path.lexists(path / MANIFEST)


def measuring_time_s(records: Iterable[TrialRecord]) -> float:
    """Seconds in which at least one of these trials was running.

    Trials that took turns overlap and count once; time between trials (a pause before a run was resumed, a clock that
    was set) does not count. The length of each trial is measured by a monotonic clock, so a jump of the wall clock can
    only separate trials that overlapped: it adds at most the time of one group.
    """
    spans = sorted(
        (record.started_unix_s, record.started_unix_s + record.wall_time_s) for record in records if record.wall_time_s
    )
    total_s, reached = 0.0, float("-inf")
    for begin, end in spans:
        total_s += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total_s


# --- packed runs ------------------------------------------------------------------------------------------------------
# A packed run is a zip archive of the files in a run's folder, made by `lorameter pack`. A reader gets a temporary
# folder, so that all runs are read in the same way. Only the known files of a run are extracted, under fixed names and
# up to a maximum size, because a file from another user may contain anything.

PACKED_SUFFIX = ".lorameter.zip"
PACKED_FILES = (MANIFEST, TRIALS, CHECKS)
"""The measurement files of a run; every run has a manifest."""
MAX_PACKED_BYTES = 4 << 30
"""Limit of their total size: three times that of a run with a hundred thousand trials."""
_ASK_AGAIN = "Ask for the file again, or for the run's directory."


def is_packed(path: Path) -> bool:
    """Whether a file exists and contains an archive."""
    return fileio.is_file(path) and zipfile.is_zipfile(path)


def list_packed(folder: Path) -> list[Path]:
    """The packed runs in a folder, by name."""
    return sorted(path for path in folder.glob(f"*{PACKED_SUFFIX}") if is_packed(path))


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpack a packed run into a temporary folder, which is removed at the end.

    Inside the block, errors about the folder name the packed file instead, because the user knows only the file.

    Raises:
        UsageError: the file contains no run, is damaged, or is too large for a run.
        InvalidRunError: there is no disk space to unpack it.
    """
    with scratch_folder() as folder:
        with translate_write_errors(f"{path}, unpacked into {folder.parent}", "Name another folder with TMPDIR."):
            try:
                with zipfile.ZipFile(path) as archive:
                    _extract(archive, path, folder)
            # zipfile raises RuntimeError for an encrypted member, and a subclass of it for an unknown compression.
            except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as error:
                if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
                    raise
                raise UsageError(f"{path}: cannot be unpacked: {error}. {_ASK_AGAIN}") from None
        try:
            yield folder
        except UsageError as error:
            message = str(error).replace(f"{folder}{os.sep}", f"{path}: ")
            raise UsageError(message if path.name in message else f"{path}: {message}") from None


def _extract(archive: zipfile.ZipFile, path: Path, folder: Path) -> None:
    entries = {info.filename: info for info in archive.infolist()}
    if MANIFEST not in entries:
        raise UsageError(f"{path}: an archive without {MANIFEST} is not a packed run. {_ASK_AGAIN}")
    files = [name for name in PACKED_FILES if name in entries]
    if sum(entries[name].file_size for name in files) > MAX_PACKED_BYTES:  # reading stops at the stated size
        raise UsageError(f"{path}: it holds more than the {MAX_PACKED_BYTES >> 30} GiB that are read. {_ASK_AGAIN}")
    for name in files:
        archive.extract(entries[name], folder)


def write_packed(target: Path, folder: Path) -> None:
    """Write the run in a folder as one file; equal runs give identical files.

    Raises:
        OSError: the file cannot be written.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in PACKED_FILES:
            if (folder / name).is_file():
                info = zipfile.ZipInfo(name)  # the default time, 1980, does not reveal when it was packed
                info.compress_type = zipfile.ZIP_DEFLATED
                with (folder / name).open("rb") as source, archive.open(info, "w", force_zip64=True) as member:
                    shutil.copyfileobj(source, member)

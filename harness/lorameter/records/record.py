"""The record of a trial, and the fragments from which it is merged.

Failures are data: every outcome of a trial becomes a record with a status, and a sweep continues. Records contain only
facts: samples and single values as measured; estimates are computed from these on demand and never stored.

Facts about workers, tokens and bases are known before the measurement: a measuring process sends them to its parent,
and parts of them are in the manifest of a run.

A memory breakdown has kinds, the measured peak, and the unexplained remainder. A sum of parts is informative only if it
is independent of the total. So each kind is measured separately, the peak is measured in another way, and the remainder
is a separate line, which may be negative.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from lorameter.errors import UsageError, redact

SCHEMA = 5
"""Version of the files of a run. A reader refuses all other versions."""

Line = Annotated[str, msgspec.Meta(pattern=r"^[^\n\r\v\f\x1c-\x1e\x85\u2028\u2029]*\Z")]
"""A name on one line. CI runners read output line by line, and would interpret a second line as a command."""


UnixTime = Annotated[float, msgspec.Meta(ge=0, lt=2**40)]
"""Seconds since 1970 that have a date."""


def require_readable(data: Any, source: Path) -> None:
    """Raise `UsageError` for data from a file of a run that does not follow this schema."""
    if not isinstance(data, dict):
        raise UsageError(f"{source}: {reprlib.repr(data)}: a table is expected. Measure again, or restore the file.")
    if data.get("schema") != SCHEMA:
        raise UsageError(
            f"{source}: schema {reprlib.repr(data.get('schema'))}, and this version reads {SCHEMA}. Use the version "
            "that wrote it."
        )


Status = Literal["ok", "invalid", "oom", "timeout", "crashed", "interrupted", "not_run"]
FINAL_STATUSES: tuple[Status, ...] = ("ok", "invalid", "oom", "timeout", "crashed")
"""Final statuses of a trial. The others mean that it was ended from outside, or never began."""
Role = Literal["variant", "control"]
Interleaving = Literal["shared-base", "lockstep", "replicates", "separate"]
Side = Literal["", "base", "candidate"]
"""The side of an A/B to which a trial belongs; empty without sides."""
SIDES: tuple[Side, ...] = ("base", "candidate")


class _Redacted(msgspec.Struct, frozen=True):
    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            msgspec.structs.force_setattr(self, name, redact(getattr(self, name)))


class Notice(_Redacted, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message for readers of the results, with a remedy. Its texts are redacted."""

    code: str
    message: str
    remedy: str


class Failure(_Redacted, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a trial is not ok: the phase, the kind, the message, and the traceback in the child. Its texts are redacted,
    because libraries repeat their inputs."""

    phase: str
    kind: str
    message: str
    traceback: str = ""


UNDER_WAY = "UnderWay"
"""Kind of the failure in a record that was written before the end of its trial."""
DISTURBED = "Disturbed"
"""Kind of the failure of a trial that was disturbed so much that its numbers do not count."""


class PartialRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The results that one command adds to a trial; the parent merges fragments, so a later death of the process loses
    nothing.

    `samples` are raw values in the order of measurement, `values` are single values (seconds, tokens a second, loss),
    `memory` contains bytes by kind, `checks` the evidence of kernels_check.
    """

    samples: dict[str, tuple[float, ...]] = msgspec.field(default_factory=dict)
    values: dict[str, float] = msgspec.field(default_factory=dict)
    memory: dict[str, int] = msgspec.field(default_factory=dict)
    checks: tuple[dict[str, Any], ...] = ()
    notices: tuple[Notice, ...] = ()
    tokens: dict[str, Any] = msgspec.field(default_factory=dict)
    software: dict[str, str] = msgspec.field(default_factory=dict)
    """Versions of packages, and of `python` and `cuda`, as reported by a script's own process; empty for other trials,
    whose versions are in the run's provenance."""
    failure: Failure | None = None
    status: Status = "ok"

    def failed(self, status: Status, failure: Failure) -> PartialRecord:
        """This fragment with a status and failure."""
        return msgspec.structs.replace(self, status=status, failure=failure)

    def with_notice(self, notice: Notice) -> PartialRecord:
        """This fragment with one more notice."""
        return msgspec.structs.replace(self, notices=(*self.notices, notice))


class TrialRecord(PartialRecord, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trial as measured: one line of trials.jsonl."""

    schema: int = SCHEMA
    trial: str
    status: Status
    name: str
    variant: str
    """Content id of the variant."""
    role: Role
    replicate: int
    position: int
    """Index in the order of the run, from 0."""
    attempt: int = 0
    """Number of earlier measurements of the trial that a disturbance made invalid."""
    interleaving: Interleaving
    """Interleaving with the trials that it is compared with; "replicates" if it was alone in its turn."""
    side: Side = ""
    site: str = ""
    """The site on which it was measured, together with all trials paired with it; empty if there is only one site."""
    machine: str = ""
    """Kind of the site's machine, in a run whose sites may be different machines, which are never combined."""
    seed: int
    started_unix_s: float
    wall_time_s: float
    turn_lengths: tuple[int, ...] = ()
    """Number of timed steps in each turn, in order; they sum to the length of the step samples."""
    log: str = ""
    """Path of the log, relative to the run's directory."""

    @property
    def settled(self) -> bool:
        """Whether the trial ended by itself, with or without success."""
        return self.status in FINAL_STATUSES

    @property
    def under_way(self) -> bool:
        """Whether it was written before the end of its trial."""
        return self.failure is not None and self.failure.kind == UNDER_WAY

    @property
    def disturbed(self) -> bool:
        """Whether the trial is invalid because of a disturbance, not because of itself."""
        return self.failure is not None and self.failure.kind == DISTURBED

    def replaced(self, **changes: Any) -> TrialRecord:
        """This record with some fields replaced."""
        return msgspec.structs.replace(self, **changes)

    def merged(self, fragment: PartialRecord) -> TrialRecord:
        """This record merged with a fragment: samples are appended, other fields are united, and a bad status stays."""
        samples = dict(self.samples)
        for name, values in fragment.samples.items():
            samples[name] = samples.get(name, ()) + values
        return msgspec.structs.replace(
            self,
            status=self.status if self.status != "ok" else fragment.status,
            samples=samples,
            values=self.values | fragment.values,
            memory=self.memory | fragment.memory,
            checks=self.checks + fragment.checks,
            notices=self.notices + fragment.notices,
            tokens=self.tokens | fragment.tokens,
            software=self.software | fragment.software,
            failure=self.failure or fragment.failure,
        )


def find_unmet(checks: Iterable[Mapping[str, Any]], required: Mapping[str, Any]) -> Failure | None:
    """The failure of a step without a required path; a path that was not watched does not pass. None if it has all
    paths.

    Args:
        checks: checks of the judged paths, as plain data.
        required: values by path.
    """
    by_path = {str(check["path"]): check for check in checks}
    failed = {
        path: value
        for path, value in required.items()
        if path not in by_path or by_path[path].get("status") != "active"
    }
    if not failed:
        return None
    missing = "no row of the watched step is about it" if by_path else "no step was watched"
    message = "; ".join(
        f"{path}: required {value!r}, {by_path[path].get('reason') if path in by_path else missing}"
        for path, value in failed.items()
    )
    kind = "RequiredPathNotSeen" if by_path.keys().isdisjoint(failed) else "RequiredPathNotActive"
    return Failure(phase="verify", kind=kind, message=message)


def judge_required(
    fragment: PartialRecord, required: Mapping[str, Any], *, name: str, allow_fallback: bool
) -> PartialRecord:
    """The fragment of a verified trial: invalid if a required path is missing, or with a notice if that is allowed."""
    failure = find_unmet(fragment.checks, required)
    if failure is None:
        return fragment
    if not allow_fallback:
        return fragment.failed("invalid", failure)
    return fragment.with_notice(
        Notice(
            code="fallback-allowed",
            message=f"{name}: measured although not what is required: {failure.message}",
            remedy="Rank it under what really ran, or set allow_fallback = false in the study.",
        )
    )


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker's first message, after it has imported the libraries that every trial needs."""

    harness: str
    """Version and content of the harness that it runs."""
    import_time_s: float
    device: str
    """"cuda" or "cpu", as torch sees it."""
    torch: str
    lacks: str | None = None
    """Why bitsandbytes could not run on that device; None if it can."""


class Example(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A held-out record that the model receives whole: its prompt and its reference answer."""

    prompt: str
    reference: str


class TokenSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Facts about a plan's tokens; part of every record."""

    path: str
    """Absolute path on the machine that measures."""
    hash: str
    data: str
    """Description of the records; "synthetic" for generated ones."""
    synthetic: bool
    tokenizer_substituted: bool
    train_sequences: int
    real_tokens: int
    """Tokens of records in one epoch of the training stream."""
    padded_tokens: int
    """Padding in one epoch of the training stream."""
    records: int
    loss_tokens: int | None = None
    """Tokens in the loss, in one epoch of the training stream; None if they were not counted."""
    without_loss: int = 0
    """Sequences that were left out because they contain no token of an answer."""
    examples: tuple[Example, ...] = ()
    """The whole prompts, in the order of their numbers."""


class BaseSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A base that was prepared for all processes of a run: read, converted and quantised once, unless it was cached."""

    path: str
    """Absolute path of its folder on the machine that measures."""
    hash: str
    """XXH3 of its tensor file."""
    base: str
    """Description: model, type and quantisation."""
    bytes: int
    """Size of the tensor file."""
    conversions: int
    """How often the base was read and converted, or generated, for this run: once, or 0 if it was cached."""
    quantisations: int
    """How often it was quantised for this run."""
    seconds: float
    """Time to make the base, or to find a complete one in the cache."""
    load_s: float = 0.0
    """Time to make the base from its source; a cold start spends it again."""


SERVED = "served"
"""Key in a fragment: the observations of a process for its modes."""
PROMPTS = "prompts"
"""Key in a fragment: the tokens of the prompts."""


class LogitDistance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Distance between the logits of one answer and the reference's, at the positions of the reference's answer, so
    that both have the same input tokens. Computed in float64."""

    positions: int
    argmax_differs: int
    """Positions at which the most likely token differs."""
    kl_mean_nats: float
    """Mean over positions of the divergence of the next-token distribution from the reference's, KL(reference ‖
    other)."""
    kl_max_nats: float
    difference_mean: float
    """Mean absolute difference, over positions and vocabulary."""
    difference_max: float
    """Largest absolute difference."""
    cosine_mean: float
    """Mean over positions of the cosine similarity between the two rows of logits."""
    cosine_min: float


class ServedAnswers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One adapter, served in one way."""

    way: str
    answers: tuple[tuple[int, ...], ...] = ()
    """Tokens of each greedy answer, in the order of the prompts."""
    distances: tuple[LogitDistance, ...] = ()
    """Distances from the reference, one per answer; empty for the reference itself."""
    losses: tuple[float, ...] = ()
    """Mean loss over the labelled tokens of each held-out sequence that has any, in nats."""
    failure: Failure | None = None
    """Why there are no observations."""


MemoryPhase = Literal["train", "generate"]
MEMORY_PHASES: tuple[MemoryPhase, ...] = ("train", "generate")

MEMORY_KINDS: Mapping[str, str] = {
    "process": "process baseline",
    "library_code": "library code paged in since",
    "generated_code": "code that libraries generate",
    "library_heap": "kept by libraries on the heap",
    "interpreter": "arenas of the interpreter",
    "checkpoint_pages": "mapped checkpoint beyond its tensors",
    "linear_weights": "linear layers of the base",
    "quantization_state": "constants of quantisation",
    "embeddings": "embeddings and head",
    "norms": "norms",
    "buffers": "buffers",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "paged_optimizer_state": "optimizer state, paged",
    "activations": "activations kept for backward",
    "logits": "logits, and the loss's copies of them",
    "temporaries": "other temporary tensors",
    "operator_scratch": "inside the operator at the peak",
    "kv_cache": "keys and values of the context",
    "blas_workspace": "workspace of cuBLAS",
    "rounding": "rounded up by the allocator",
    "heap_slack": "free, and kept by malloc",
    "heap_growth": "grown when less was alive",
}
"""Kinds in display order, with their titles. Embeddings, norms and buffers are distinguished by dtype: their kind is
followed by the name of the dtype ("norms_float32")."""
BY_TYPE = ("embeddings", "norms", "buffers")


def memory_kind_title(kind: str) -> str:
    """The title of a kind in a table."""
    stem, _, dtype = kind.partition("_")
    return f"{MEMORY_KINDS[stem]}, {dtype}" if stem in BY_TYPE else MEMORY_KINDS[kind]


def order_memory_kinds(kinds: Mapping[str, int], *, named: Collection[str] = ()) -> dict[str, int]:
    """The kinds with nonzero sizes, and those in `named` in any case, in display order."""
    order = {stem: place for place, stem in enumerate(MEMORY_KINDS)}

    def place(kind: str) -> int:
        stem = kind.partition("_")[0]
        return order[stem if stem in BY_TYPE else kind]

    every = dict.fromkeys(named, 0) | dict(kinds)
    return {kind: every[kind] for kind in sorted(every, key=place) if every[kind] or kind in named}


class MemoryAccount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resident memory at the peak of one phase, in bytes by kind, and the measured peak.

    On CUDA it is device memory, and the peak is the allocator's; else it is the peak resident set of the process.
    """

    phase: MemoryPhase
    kinds: dict[str, int]
    """Bytes by kind (`MEMORY_KINDS`), each measured separately."""
    peak_bytes: int
    outside_allocator: dict[str, int] = msgspec.field(default_factory=dict)
    """Bytes that are not in CUDA's allocated peak: `fragmentation`, which is reserved but not allocated, and
    `paged_optimizer_state`, which is managed memory. Empty on a CPU."""

    @property
    def unexplained_bytes(self) -> int:
        """The part of the peak that no kind explains; negative if the kinds exceed the peak."""
        return self.peak_bytes - sum(self.kinds.values())

    @property
    def share(self) -> float:
        """The unexplained part of the peak."""
        return self.unexplained_bytes / self.peak_bytes

"""A protocol: how often, how long and where variants are measured, independent of the variants.

The replicate (fresh processes) is the unit of inference; steps inside a process are sub-samples. Kalibera & Jones
(2013, "Rigorous benchmarking in reasonable time") show why: processes differ more from each other than steps do, so
repeating steps in one process gains little. One setting, `effort`, sets the number of replicates.

The options `on` and `sites` of a study or a command line are parsed and validated here, on any machine.
`lorameter.run.sites` checks that the GPU, cluster or queue exists.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lorameter.errors import require, shorten
from lorameter.measurements.metrics import PHASES, Phase
from lorameter.stats import VerdictRule
from lorameter.stats.looks import LOOKS, look_level, planned_looks

PRECISION_REPLICATES = 40
"""Default maximum of the replicates if a precision is given."""
LIMITED_REPLICATES = 12
"""Default maximum of the replicates if a time limit is given."""
JUDGED_REPLICATES = LOOKS[-1]
"""Default maximum of the replicates if the run ends when it is decided."""
EFFORT_REPLICATES: dict[str, int] = {"quick": 3, "standard": 8, "rigorous": 12}

_MINIMUM = {
    "replicates": 1, "warmup_steps_min": 1, "turns": 1, "steps_per_turn": 1, "generate_warmup": 0,
    "generate_requests": 1, "open_ended_requests": 1, "peak_replicates": 0, "cold_replicates": 1, "retries": 0,
    "seed": 0, "memory_limit_bytes": 1, "epochs": 0,
}  # fmt: skip
STEPS_PER_TURN = 2
HERE, RAY, SLURM = "here", "ray", "slurm"
"""Places of a run: this machine, a Ray cluster, SLURM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Replicates, warm-up, timed turns and limits. Raises `UsageError` for values that would measure nothing."""

    replicates: int = EFFORT_REPLICATES["quick"]
    """Passes over all variants in fresh processes: the unit of every interval."""
    warmup_steps_min: int = 3
    """Minimum number of discarded steps."""
    warmup_steps_max: int = 12
    """Maximum number of discarded steps; the warm-up ends when the step times are steady."""
    turns: int = 8
    """Timed turns of a trial in the training phase."""
    steps_per_turn: int = STEPS_PER_TURN
    """Timed steps of a turn."""
    epochs: float = 0.0
    """Train every trial for at least this many epochs: steps beyond the timed turns follow untimed, for the losses. 0
    ends the training with the timed turns."""
    phases: tuple[Phase, ...] = PHASES
    """Phases that are measured by default."""
    merged: bool = True
    """Also measure requests with the adapter merged."""
    peak_replicates: int = 3
    """Number of isolated trials that measure memory peaks. Peaks take few values and are compared by their maximum, so
    a few trials suffice. 0: no peaks."""
    cold_replicates: int | None = None
    """Replicates that measure cold starts, each of which reads, converts and quantises the base from its own files.
    None: all replicates."""
    generate_warmup: int = 1
    """Discarded requests between the first call and the warm ones."""
    generate_requests: int = 6
    """Warm requests per trial and adapter state (unmerged, merged)."""
    open_ended_requests: int = 6
    """Requests that end at EOS, if the workload has such requests."""
    seed: int = 0
    """Seed for the order of the plan and, with the replicate's number, for the training."""
    step_timeout_s: float = 600.0
    """Maximum time without an answer of a worker to one command; the worker is killed after it."""
    memory_limit_bytes: int | None = None
    """Address-space limit of a trial's process on a CPU; reaching it makes the trial `oom` instead of the machine."""
    retries: int = 2
    """How often a trial is measured again because a disturbance exceeded a limit (`lorameter.machine.disturbances`),
    together with all trials that took turns with it, at the end of its replicate. After that it stays invalid."""
    allow_disturbed: bool = False
    """Accept such trials, with a notice, for a machine that is shared with others."""
    precision: float | None = None
    """Stop as soon as every compared interval is at most this far from its centre (a fraction: 0.05 is 5 %; the
    tolerance of 0.01 is a good choice), but not before 5 replicates; `replicates` is the maximum. None measures all
    replicates."""
    until_decided: bool = False
    """End the run as soon as every comparison with the reference, or of the two sides, is decided: slower, faster or
    equivalent. It is judged after 3, 4, 5, 6, 8, 10 and 12 replicates, as far as `replicates` goes, at a stricter level
    that keeps the error rate of all these looks together (docs/method.md). Not together with a precision."""
    max_minutes: float | None = None
    """Time limit of a run in minutes from its start, including the preparation of tokens and bases. A resumed
    run starts with the full limit. Turns, replicates, cold starts and requests are dropped to meet the limit, for all
    variants alike, by the rule in docs/method.md. None sets no limit. Another model, precision, effort or number of
    replicates on the command line lifts the limit of the study."""
    on: str = HERE
    """Where `run`, `ab`, `calibrate` and pytest measure replicates, as with `--on`: `here`, `ray`, `ray://HOST:PORT` or
    `slurm:KEY=VALUE,…`. Not allowed in a profile, which is chosen by the current device."""
    sites: tuple[str, ...] = ()
    """The sites of `on` that are used at once, as with `--sites`: GPUs of this machine, or shares of its CPUs, as
    `["0", "1"]`, or `["0+1", "2+3"]` for trials with two ranks; node names on Ray; not with SLURM, whose `on` gives
    their number. Empty: one device here, all nodes of a cluster. Not allowed in a profile."""
    mixed: bool = False
    """Allow sites with different GPUs or CPUs, as with `--mixed`: on sites of this machine replicates are divided
    evenly, and every ratio belongs to one site, with its own interval; no value combines several sites. Not allowed
    with a precision or in a profile."""

    def __post_init__(self) -> None:
        check_minimum("protocol", self, _MINIMUM, positive=("max_minutes", "step_timeout_s"))
        check_fraction("protocol", "precision", self.precision)
        require(
            self.warmup_steps_max >= self.warmup_steps_min,
            f"protocol: warmup_steps_max = {self.warmup_steps_max}: below warmup_steps_min = {self.warmup_steps_min}. "
            "Raise it.",
        )
        require(self.phases, f"protocol: phases = []: nothing to measure. Name some of {', '.join(PHASES)}.")
        require(
            not self.mixed or self.precision is None,
            f"protocol: precision = {self.precision}: a precision needs one interval, but with "
            "mixed each site has its own. Remove one of the two, and set replicates.",
        )
        require(
            not self.until_decided or (self.precision is None and not self.mixed),
            "protocol: until_decided = true: "
            + ("with mixed each site has its own verdicts." if self.mixed else "a precision is another rule to stop.")
            + " Remove one of the two.",
        )
        self._check_place()

    @property
    def looks(self) -> tuple[int, ...]:
        """The numbers of replicates after which the run is judged while it is measured; empty if it is not."""
        return planned_looks(self.replicates) if self.until_decided else ()

    @property
    def alpha(self) -> float:
        """The two-sided error rate of a comparison's interval: that of one look, if the run is judged at several."""
        rate = VerdictRule().alpha
        return look_level(rate, self.looks) if self.looks else rate

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a trial, independent of its warm-up length: the first, the maximum warm-up, the timed
        ones."""
        return 1 + self.warmup_steps_max + self.turns * self.steps_per_turn

    def all_steps(self, sequences: int, sequences_per_step: int) -> int:
        """The larger of `total_steps` and the steps of the requested epochs, of `sequences` each."""
        return max(self.total_steps, math.ceil(self.epochs * sequences / sequences_per_step))

    def here(self) -> Protocol:
        """The same protocol on one device of this machine."""
        return dataclasses.replace(self, on=HERE, sites=(), mixed=False)

    def _check_place(self) -> None:
        if is_slurm(self.on):
            read_slurm(self.on)
            require(
                not self.sites,
                f"{format_on(self.on)}: its jobs are the sites. Write sites=N in it, and leave sites out.",
            )
        elif self.on == HERE:
            require(
                all(map(_NUMBERS.fullmatch, self.sites)),
                f"{format_sites(self.sites)}: numbers with commas between them are expected. Write 0,1 for two sites, "
                'or sites = ["0", "1"] in [protocol]; 0+1,2+3 for two of two GPUs each, where trials have two ranks.',
            )
            require(
                not self.mixed or len(self.sites) > 1,
                "mixed: there is only one site. Name several in sites, or remove mixed.",
            )
        else:
            require(
                self.on == RAY or self.on.startswith(f"{RAY}://"),
                f"{format_on(self.on)}: not known. Use {HERE}, {RAY}, {RAY}://HOST:PORT of a cluster's client port, or "
                f"{SLURM}:KEY=VALUE,….",
            )
        named = [number for name in self.sites for number in site_numbers(name)] if self.on == HERE else self.sites
        require(
            all(self.sites) and len(set(named)) == len(named),
            f"{format_sites(self.sites)}: one is named twice, or has no name. Name each once.",
        )

    @property
    def is_plain(self) -> bool:
        """Whether neither option is given: one device of this machine, or all CPUs."""
        return self.on == HERE and not self.sites

    @property
    def said(self) -> str:
        """The option that selects the place, for messages."""
        return format_sites(self.sites) if self.on == HERE else format_on(self.on)


SLURM_OPTIONS = (
    "partition", "account", "qos", "reservation", "constraint", "nodelist", "exclude", "gres", "gpus_per_node",
    "cpus_per_task", "mem", "time", "comment", "exclusive",
)  # fmt: skip
"""Options that are passed to sbatch, by sbatch's names."""


_NUMBERS = re.compile(r"[0-9]{1,4}(\+[0-9]{1,4})*")
"""Name of a site on this machine: a GPU, or the GPUs of a trial with several ranks."""


def site_numbers(name: str) -> tuple[int, ...]:
    """The GPU numbers of this machine, or CPU shares, that form one site: "0", or "0+1"."""
    return tuple(map(int, name.split("+")))


def format_sites(sites: Sequence[str]) -> str:
    """The sites as text, for messages."""
    return f"sites = {','.join(sites)!r}"


def format_on(on: str) -> str:
    """The value of `on` as text, for messages."""
    return f"on = {on!r}"


def is_slurm(on: str) -> bool:
    """Whether a value of `on` names SLURM jobs."""
    return on.partition(":")[0] == SLURM


def read_slurm(on: str) -> tuple[int, dict[str, str]]:
    """The number of jobs in the queue at a time, and the options passed on to sbatch, of a text such as
    "slurm:sites=4,partition=gpu,gres=gpu:1,time=60".

    A value may contain commas: a part without "=" belongs to the value before it.

    Raises:
        UsageError: a key is unknown, or a value is invalid.
    """
    listed = on.partition(":")[2]
    known = ("sites", *SLURM_OPTIONS)
    found: dict[str, str] = {}
    for part in re.split(r",(?=[^,=]*=)", listed) if listed else ():
        key, equals, text = part.partition("=")
        require(key in known and equals, f"{format_on(on)}: {key!r} is not known. Use KEY=VALUE of {', '.join(known)}.")
        require(key not in found, f"{format_on(on)}: {key} is given twice. Give it once.")
        require(text and text.isprintable(), f"{format_on(on)}: {key}={text!r}: a text on one line is expected.")
        found[key] = text
    sites = found.pop("sites", "1")
    require(re.fullmatch("[1-9][0-9]{0,2}", sites), f"{format_on(on)}: sites={sites}: 1 to 999 are possible.")
    return int(sites), found


MAX_VARIANTS = 1_000
MAX_ROUNDS = 2_000_000
"""Maximum turns and requests of all trials of a plan."""
MAX_TOKENS = 2**28
"""Maximum tokens of an epoch, including padding; they are prepared in memory and written to a file of 32 bytes a
token."""
NAME_BYTES = 120
"""Maximum bytes of a part of a file name, to which a side, a replicate and a suffix are added; file systems allow
255."""
MAX_FRACTION = 0.5
"""Largest tolerance, margin or precision. A larger value is probably a percentage."""
TEXT_CHARACTERS = 4096
"""Maximum length of a path or a model name; the kernel accepts no longer path."""


def check_minimum(where: str, owner: object, minimum: Mapping[str, float], *, positive: Collection[str] = ()) -> None:
    """Raise `UsageError` for a field below its minimum, or not above zero; None is a field that is not given."""
    for key in (*minimum, *positive):
        value, least = getattr(owner, key), minimum.get(key)
        fits = value is None or ((value > 0 if least is None else value >= least) and value < float("inf"))
        allowed = "a number above 0" if least is None else f"{least:g} or more"
        require(fits, f"{where}: {key} = {value!r}: too small, or not a finite number. Use {allowed}.")


def check_fraction(where: str, key: str, value: float | None, *, zero: bool = False) -> None:
    """Raise `UsageError` for a tolerance, margin or precision that is not a fraction up to 0.5; `zero` allows 0."""
    require(
        value is None or 0 < value <= MAX_FRACTION or (zero and value == 0),
        f"{where}: {key} = {value!r}: not a fraction that two results can be judged by. Use a fraction "
        f"{'of 0 or more' if zero else 'above 0'}, up to {MAX_FRACTION}; 0.05 is 5 %.",
    )


def check_name(label: str, name: str, forbidden: str = "/") -> None:
    """Raise `UsageError` for a name that cannot be a part of a file name."""
    size = len(name.encode("utf-8", errors="replace"))
    require(
        size <= NAME_BYTES,
        f"{label} {shorten(name, 60)!r}: {size} bytes long, and part of file names. Use {NAME_BYTES} or fewer.",
    )
    require(
        name and name.isprintable() and not set(forbidden) & set(name),
        f"{label} {name!r}: a name is part of test ids and file names. Use letters, digits, '-', '_', '.', '='.",
    )


def check_word(where: str, key: str, text: str, *, lines: bool = False) -> None:
    """Raise `UsageError` for a text that is not UTF-8 (bytes of a command line), too long, or has control characters;
    `lines` allows line breaks and tabs."""
    control = "[\0\ud800-\udfff]" if lines else "[\0-\x1f\x7f-\x9f\ud800-\udfff]"
    require(
        len(text) <= TEXT_CHARACTERS and not re.search(control, text),
        f"{where}: {key} = {shorten(ascii(text), 80)}: too long, no UTF-8, or with control characters in it. Correct "
        "it.",
    )

"""The columns of a run's four tables: name, type and meaning.

DataFrames and files have the same columns. Units are base units and part of the name; if a column holds several
metrics, the column `unit` gives the unit of each row (`s`, `byte`, `1/s`, `J`, `1`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from lorameter.machine.software import MAIN_LIBRARIES
from lorameter.studies.variant import FORMS, KEYS
from lorameter.studies.workload import OF_VARIANTS, Workload

Kind = Literal["text", "count", "number", "flag"]
TableName = Literal["trials", "samples", "estimates", "comparisons"]
DTYPES: Mapping[Kind, str] = {"text": "string", "count": "Int64", "number": "float64", "flag": "boolean"}
"""The pandas dtype of each kind of column; a missing value is NA, a missing number NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameColumn:
    """One column of a table."""

    name: str
    kind: Kind
    description: str


def _column(name: str, kind: Kind, description: str) -> FrameColumn:
    return FrameColumn(name=name, kind=kind, description=description)


_RUN = _column("run", "text", "id of the run")
_SIDE = _column("side", "text", "`base` or `candidate` of an A/B; missing where there are no sides")
_ROLE = _column("role", "text", "`variant`, or `control`: the reference measured once more")
_VARIANT = _column("variant", "text", "name of the variant in its study")
_VARIANT_ID = _column("variant_id", "text", "hash of what the variant is, and of its workload where it has its own")
_METRIC = _column("metric", "text", "name of the metric, of a single value or of a kind of memory")
_PHASE = _column("phase", "text", "`train`, `generate` or `cold`; missing where it belongs to none")
_UNIT = _column("unit", "text", "unit of the values in this row")
_INTERLEAVING = _column("interleaving", "text", "how the trials alternated with those that they are compared with")

_KINDS: Mapping[Any, Kind] = {int: "count", float: "number", bool: "flag"}
"""Kind of a field by its type; all other fields are text."""
_NO_SETTINGS = ("name", "cwd", "env", "python", "method", "peft")
"""Fields of a variant that have no column: its label, the folder of its command, and contents of other columns."""


def _settings(cls: type, prefix: str, names: Iterable[str], description: str) -> tuple[FrameColumn, ...]:
    hints = get_type_hints(cls)
    return tuple(
        _column(f"{prefix}{name}", _KINDS.get(hints[name], "text"), description.format(name=name)) for name in names
    )


_HINTS = {key: hint for form in FORMS for key, hint in get_type_hints(form).items()}
OF_VARIANT = (
    *(
        _column(key, _KINDS.get(_HINTS[key], "text"), f"`{key}` of the variant")
        for key in KEYS
        if key not in _NO_SETTINGS
    ),
    _column("method", "text", "what trains: PEFT's name of the method, `full fine-tuning` or `script`"),
    _column("peft_config", "text", "configuration of PEFT, of a variant that has one"),
)
OF_WORKLOAD = _settings(Workload, "workload_", OF_VARIANTS, "`{name}` of the workload that the variant is measured on")
VALIDITY = (
    _column("valid", "flag", "whether the numbers of its variant count"),
    _column("invalid_reason", "text", "the first reason why they do not: `trial-failed`, `control-differs`, …"),
    _column("invalid_message", "text", "all reasons in words"),
)
SETTINGS = (
    *OF_VARIANT,
    *OF_WORKLOAD,
    _column("commit", "text", "commit of the repository that it was measured in; of an A/B of revisions the side's"),
    _column("dirty", "flag", "whether the repository had changes that were not committed"),
    *(_column(name, "text", f"version of {name}; of an A/B the side's") for name in MAIN_LIBRARIES),
)
"""The last columns of `trials` and `estimates`. A setting that has no effect is missing, such as `double_quant` without
a 4-bit base, or all settings of a variant that is a command."""

TABLES: Mapping[TableName, tuple[FrameColumn, ...]] = {
    "trials": (
        _RUN,
        _column("study", "text", "name of the study"),
        _column("fingerprint", "text", "hash of what must agree for two runs to be compared"),
        _column("trial", "text", "id of the trial in its run"),
        _VARIANT,
        _VARIANT_ID,
        _ROLE,
        _SIDE,
        _column("replicate", "count", "from 0; trials of one replicate are paired"),
        _column("position", "count", "place in the order of the run, from 0"),
        _column("attempt", "count", "how often it had been measured before in surroundings that made it invalid"),
        _column("counts", "flag", "whether it is the last attempt, the one that numbers are taken from"),
        _INTERLEAVING,
        _column("seed", "count", "seed of the trial"),
        _column("status", "text", "how it ended: `ok`, `invalid`, `oom`, `timeout`, `crashed`, …"),
        _column("failed_in", "text", "phase in which it failed; missing where it did not"),
        _column("failure", "text", "why it failed"),
        _column("started_unix_s", "number", "when it began, seconds since 1970"),
        _column("wall_time_s", "number", "how long it took"),
        _column("log", "text", "path of its log in the run's folder"),
        *VALIDITY,
        *SETTINGS,
    ),
    "samples": (
        _RUN,
        _column("trial", "text", "id of the trial"),
        _VARIANT,
        _ROLE,
        _SIDE,
        _column("replicate", "count", "from 0"),
        _PHASE,
        _METRIC,
        _UNIT,
        _column("sample", "count", "place in the order measured, from 0"),
        _column("turn", "count", "the turn that a timed step belongs to, from 0; missing elsewhere"),
        _column("value", "number", "as measured"),
    ),
    "estimates": (
        _RUN,
        _column("study", "text", "name of the study"),
        _column("fingerprint", "text", "hash of what must agree for two runs to be compared"),
        _VARIANT,
        _VARIANT_ID,
        _ROLE,
        _SIDE,
        _PHASE,
        _METRIC,
        _UNIT,
        _column("higher_is_better", "flag", "which way is better"),
        _column("value", "number", "the estimate over replicates; of memory the largest"),
        _column("low", "number", "lower end of the interval; missing where there is none"),
        _column("high", "number", "upper end"),
        _column(
            "interval", "text",
            "what `low` and `high` are: `95 % of the mean` (Student's t over replicates), `95 % of the median` (order "
            "statistics), or `range` (smallest and largest)",
        ),
        _column("replicates", "count", "trials behind it"),
        _column("samples", "count", "samples of all trials together; they do not narrow the interval"),
        _INTERLEAVING,
        *VALIDITY,
        *SETTINGS,
    ),
    "comparisons": (
        _RUN,
        _VARIANT,
        _column("role", "text", "`variant`, or `control`: the base of the comparison against itself"),
        _column("base", "text", "what it is compared with: the reference, or the base of an A/B"),
        _column("candidate", "text", "what is judged: the variant, or the candidate of an A/B"),
        _METRIC,
        _column("ratio", "number", "candidate over base, above 1 is worse, for rates too"),
        _column("low", "number", "lower end of its interval; missing where there is none"),
        _column("high", "number", "upper end"),
        _column("verdict", "text", "`improved`, `regressed`, `equivalent`, `inconclusive`, `invalid`, …"),
        _column("reason", "text", "what decided"),
        _column("replicates", "count", "pairs of trials"),
        _column("replicates_needed", "count", "what an open question takes in all; missing where nothing would do"),
        _column("mde80", "number", "smallest detectable slow-down with 80 % power, a fraction"),
        _column("tolerance", "number", "smallest slow-down worth an alarm, as a fraction"),
        _column("margin", "number", "within it two things count as equal, as a fraction"),
        _INTERLEAVING,
    ),
}  # fmt: skip
"""The columns of each table, in order."""


def names_of(table: TableName) -> tuple[str, ...]:
    """The names of a table's columns."""
    return tuple(column.name for column in TABLES[table])

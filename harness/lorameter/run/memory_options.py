"""What to change in a variant or its workload so that it takes less memory, and what to change first.

An option is a key of a study with another value: what is estimated with it is a variant that can be run, and what its
fields refuse is left out with their reason. The batch is the last to go down, because less of it is another training.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lorameter.errors import UsageError
from lorameter.models.costs.storage import width
from lorameter.run.feasibility import check_widths
from lorameter.run.memory_fit import FitStatus, Fitter, Largest, MemoryDevice, Needs
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOption:
    """A change that frees memory."""

    writes: str
    """The line of a study that makes it."""
    table: Literal["variant", "workload"]
    """Where in the study it is written."""
    needs: Needs
    """With this change alone."""
    freed_bytes: int
    status: FitStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedOption:
    """A change that this variant or device cannot have, or that frees nothing."""

    writes: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What is needed of a device, what can be changed, and what to change."""

    device: MemoryDevice
    needs: Needs
    """As it is, in the phase that needs most."""
    status: FitStatus
    options: tuple[MemoryOption, ...]
    """Those that are not turned yet, what frees most first."""
    skipped: tuple[SkippedOption, ...]
    turn: tuple[str, ...] | None
    """The fewest lines with which it fits; none where it does as it is, None where all of them are not enough."""
    largest: tuple[Largest, ...] = ()
    """Batch and length, where they were asked for."""


def advise(fitter: Fitter, variant: Variant, workload: Workload, *, with_largest: bool = False) -> Advice:
    """Every option of a variant by what the estimate falls for it, and the fewest that make it fit.

    Args:
        fitter: of the model on the device.
        variant: as it is.
        workload: as it is.
        with_largest: whether the largest batch and the largest length that fit are looked for, too.

    Raises:
        UsageError: of several ranks, each of which holds what no estimate here knows.
        UnknownLayersError: of a model type whose layers are not known.
    """
    if workload.ranks > 1:
        raise UsageError(
            f"workload: ranks = {workload.ranks}: whether it fits is said of one process on one device, and what each "
            "of several holds is not estimated. Leave --gpu and --max-batch out, or set ranks = 1."
        )
    before = fitter.needs(variant, workload)
    turns, skipped = _sort_out(fitter, variant, workload)
    options: dict[_Turn, MemoryOption] = {}
    for turn in turns:
        after = fitter.needs(*turn.apply(variant, workload))
        freed = before.expected_bytes - after.expected_bytes
        if freed > 0:
            options[turn] = MemoryOption(
                writes=turn.writes, table="variant" if turn.batch_size is None else "workload", needs=after,
                freed_bytes=freed, status=fitter.status(after),
            )  # fmt: skip
        else:
            skipped.append(SkippedOption(writes=turn.writes, why="it frees nothing at the peak"))
    order = sorted(options, key=lambda turn: -options[turn].freed_bytes)
    status = fitter.status(before)
    largest = (fitter.largest_batch(variant, workload), fitter.largest_length(variant, workload))
    return Advice(
        device=fitter.device,
        needs=before,
        status=status,
        options=tuple(options[turn] for turn in order),
        skipped=tuple(skipped),
        turn=() if status == "fits" else _find_fewest(fitter, variant, workload, order),
        largest=largest if with_largest else (),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """One line of a study with another value."""

    writes: str
    changes: tuple[tuple[str, object], ...] = ()
    """Of the variant."""
    batch_size: int | None = None
    """Of the workload."""

    def apply(self, variant: Variant, workload: Workload) -> tuple[Variant, Workload]:
        """Both with it. Raises `UsageError` where the variant cannot have it."""
        if self.batch_size is not None:
            return variant, dataclasses.replace(workload, batch_size=self.batch_size)
        return dataclasses.replace(variant, **dict(self.changes)), workload  # type: ignore[arg-type]  # names of fields


def _turns(variant: Variant) -> Iterator[_Turn]:
    """Those of the variant that are not turned yet."""
    if not variant.gradient_checkpointing:
        yield _Turn(writes="gradient_checkpointing = true", changes=(("gradient_checkpointing", True),))
    if not variant.is_4bit:
        yield _Turn(writes='quantization = "nf4"', changes=(("quantization", "nf4"),))
    if variant.dtype == "float32":
        yield _Turn(writes='dtype = "bfloat16"', changes=(("dtype", "bfloat16"),))
    if variant.prepare_for_kbit and width(variant.dtype) == 2:  # it casts the head, the embeddings and the norms
        yield _Turn(writes="prepare_for_kbit = false", changes=(("prepare_for_kbit", False),))
    if variant.optimizer != "paged_adamw_8bit":
        yield _Turn(writes='optimizer = "paged_adamw_8bit"', changes=(("optimizer", "paged_adamw_8bit"),))


def _smaller_batch(fitter: Fitter, variant: Variant, workload: Workload) -> Iterator[_Turn]:
    """The largest smaller batch that fits; half of it where it fits as it is; one where none does."""
    if workload.batch_size > 1:
        most = fitter.largest_batch(variant, workload).value or 1
        rows = most if most < workload.batch_size else workload.batch_size // 2
        yield _Turn(writes=f"batch_size = {rows}", batch_size=rows)


def _sort_out(fitter: Fitter, variant: Variant, workload: Workload) -> tuple[list[_Turn], list[SkippedOption]]:
    """Those that this variant, model and device can have, and those that they cannot."""
    found: list[_Turn] = []
    skipped: list[SkippedOption] = []
    machine = fitter.device.machine
    for turn in (*_turns(variant), *_smaller_batch(fitter, variant, workload)):
        try:
            changed, _ = turn.apply(variant, workload)
            if changed.optimizer.startswith("paged") and machine.device == "cpu":
                raise UsageError("nothing is paged on a CPU, and its trials would be invalid")
            check_widths(f"variant {variant.name!r}", changed, fitter.shape, machine)
        except UsageError as error:
            skipped.append(SkippedOption(writes=turn.writes, why=str(error).rstrip(".")))
        else:
            found.append(turn)
    return found, skipped


def _find_fewest(
    fitter: Fitter, variant: Variant, workload: Workload, turns: Sequence[_Turn]
) -> tuple[str, ...] | None:
    """The smallest set with which it fits; of two of one size one that leaves the batch alone, then what frees most."""
    for size in range(1, len(turns) + 1):
        sets = itertools.combinations(turns, size)
        for chosen in sorted(sets, key=lambda some: any(one.batch_size for one in some)):
            changed, smaller = variant, workload
            try:
                for one in chosen:
                    changed, smaller = one.apply(changed, smaller)
            except UsageError:  # two that exclude each other
                continue
            if fitter.status(fitter.needs(changed, smaller)) != "fits":
                continue
            most = fitter.largest_batch(changed, workload).value or 1  # beside others it need not be as small
            rows = f"batch_size = {min(most, workload.batch_size - 1)}"
            return tuple(rows if one.batch_size else one.writes for one in chosen)
    return None

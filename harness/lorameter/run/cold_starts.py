"""Who is started cold, and in how many replicates: each start reads, converts and quantises a model anew."""

from __future__ import annotations

from collections.abc import Sequence

from lorameter.records.metrics import METRICS
from lorameter.records.record import Measure
from lorameter.run.arms import Arm
from lorameter.studies.study import Study

COLD_REPLICATES = 3
"""The fewest that give an interval worth the name."""


def cold_replicates(study: Study, contenders: Sequence[Arm]) -> int:
    """How many replicates measure cold starts. One reads, converts and quantises a model for seconds of measuring, so
    no more are made than their interval needs: all where it is asked for (two sides, a precision, a claim) or where
    minutes are limited, else three."""
    protocol = study.protocol
    if protocol.cold_replicates is not None:
        return protocol.cold_replicates
    claimed = {name for claim in study.claims for part in claim.parts for name in (part.metric, *part.metrics)}
    asked = any(one.side for one in contenders) or protocol.precision is not None
    if asked or any(metric in METRICS and METRICS[metric].phase == "cold" for metric in claimed):
        return protocol.replicates
    return protocol.replicates if protocol.max_minutes is not None else COLD_REPLICATES


def own_measures(contender: Arm, measures: tuple[Measure, ...], cold: int) -> tuple[Measure, ...]:
    """What one of them measures: a control tells what the difference of nothing looks like, and one cold start of each
    has no interval to tell it by. Both sides of a comparison have all they are asked for."""
    whole = contender.role == "variant" or contender.side or cold > 1
    return tuple(one for one in measures if one != "cold" or whole)


def takes_turns_first(study: Study, contenders: Sequence[Arm]) -> bool:
    """Whether the trials that take turns measure cold starts: a time limit may leave isolated trials out."""
    return study.protocol.max_minutes is not None and not any(one.side for one in contenders)

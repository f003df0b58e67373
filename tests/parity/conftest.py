"""Facts of an adapter in several serving modes, as a run stores them."""

from __future__ import annotations

import pytest

from lorameter.parity import Parity
from lorameter.records.record import LogitDistance, ServedAnswers
from lorameter.studies.request import AGAIN, serving_modes

EQUAL = LogitDistance(
    positions=4, argmax_differs=0, kl_mean_nats=0.0, kl_max_nats=0.0, difference_mean=0.0, difference_max=0.0,
    cosine_mean=1.0, cosine_min=1.0,
)  # fmt: skip
NEAR = LogitDistance(
    positions=4, argmax_differs=0, kl_mean_nats=1e-6, kl_max_nats=4e-6, difference_mean=0.001, difference_max=0.02,
    cosine_mean=0.9999, cosine_min=0.999,
)  # fmt: skip
FAR = LogitDistance(
    positions=4, argmax_differs=3, kl_mean_nats=0.5, kl_max_nats=0.9, difference_mean=0.3, difference_max=2.5,
    cosine_mean=0.2, cosine_min=-0.1,
)  # fmt: skip
ANSWERS = tuple((7, 8, 9, number) for number in range(8))
LOSSES = (2.0, 2.5, 3.0)


@pytest.fixture
def make_parity(small_study):
    """A function that returns the parity of the NF4 variant, with differences only for the base without adapter and the
    given modes."""

    def make(**changed: ServedAnswers) -> Parity:
        variant = small_study.variant("nf4")
        ways = tuple(way for group in serving_modes(variant) for way in group)
        served = []
        for way in ways:
            answers, distance, losses = ANSWERS, NEAR, tuple(loss + 0.001 for loss in LOSSES)
            if way.name.endswith(AGAIN) or way == ways[0]:
                distance, losses = EQUAL, LOSSES
            if not way.adapter:
                answers, distance = tuple((1, *rest) for _, *rest in ANSWERS), FAR
            distances = () if way == ways[0] else (distance,) * len(ANSWERS)
            served.append(ServedAnswers(way=way.name, answers=answers, distances=distances, losses=losses))
        served = [changed.get(one.way, one) for one in served]
        return Parity(
            study="small", variant=variant, workload=small_study.workload, device="cpu", device_name="Test CPU",
            adapter="/adapters/mine", record=None, ways=ways, served=tuple(served),
            prompts=tuple((1, 2, number) for number in range(len(ANSWERS))),
        )  # fmt: skip

    return make

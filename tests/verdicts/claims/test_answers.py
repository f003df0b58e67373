"""Tests of the share of the time of requests until EOS that the answer length explains."""

import pytest

from lorameter.verdicts.claims import answers_of
from lorameter.verdicts.series import group_trials


@pytest.fixture
def answers(make_run):
    """A function that returns the answers of a run whose requests take `per_token` seconds a token, by variant and
    request."""

    def make(tokens_of, per_token=lambda name, index: 0.02):
        def answered(record):
            tokens = [float(tokens_of(record.name, index, record.role)) for index in range(6)]
            times = [per_token(record.name, index) * count for index, count in enumerate(tokens)]
            samples = {"open_ended_tokens": tuple(tokens), "open_ended_request_time_s": tuple(times)}
            return record.replaced(samples=record.samples | samples)

        return answers_of(group_trials(make_run([], change=answered).records))

    return make


def test_length_explains_everything_at_one_speed(answers):
    """With a constant time per token the length explains everything; requests of the control do not count."""
    found = answers(lambda name, index, role: 5 + index + len(name) + 1000 * (role == "control"))
    assert found.requests.value == pytest.approx(1.0)
    assert found.variants.value == pytest.approx(1.0)
    assert (found.requests.replicates, found.requests.points, found.variants.points) == (6, 6 * 5 * 6, 6 * 5)


def test_length_explains_only_a_part_of_mixed_speeds(answers):
    """With a higher time per token in every other request, the length explains only a part."""
    found = answers(lambda name, index, role: 5 + index, lambda name, index: 0.02 * (1 + index % 2))
    assert 0 < found.requests.value < 0.9
    assert found.variants is None  # all variants gave the same answers

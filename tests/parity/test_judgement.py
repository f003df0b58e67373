"""Tests of the judgement of parity, from constructed facts."""

from __future__ import annotations

import msgspec
import pytest

from lorameter.commands.profile import encode_parity
from lorameter.parity import judge_parity
from lorameter.records.record import Failure, ServedAnswers
from lorameter.report.parity import describe_differing_answers, describe_parity
from lorameter.report.terminal import render_text
from lorameter.stats import proportion

MERGED = "merged into nf4"
AGAIN = "unmerged, nf4, asked again"
WITHOUT = "no adapter, nf4"


def served(parity, way):
    """Return the observations of a serving mode."""
    return next(one for one in parity.served if one.way == way)


def text(parity, width=80):
    """Return the report as a terminal shows it."""
    return render_text(describe_parity(parity, judge_parity(parity)), width=width, coloured=False)


def test_equal_answers_are_reported_with_the_possible_difference(make_parity):
    """The report says that all answers are equal, and how many could still differ; logits are reported separately."""
    parity = make_parity()
    judgement = judge_parity(parity)
    assert judgement.whole
    assert judgement.noise_floor.difference_max == 0
    assert [one.verdict for one in judgement.likenesses] == ["same"] * 4
    one = judgement.likenesses[0]
    assert one.answers == proportion(0, 8)
    assert one.tokens.of == 32
    assert one.loss_difference.value == pytest.approx(0.001)
    assert "same answers: 0 of 8 differ [0 %, 37 %]" in text(parity, 200)
    assert "identical" not in text(parity, 200)


def test_differing_answers_and_their_tokens_are_counted(make_parity):
    """Three of eight answers differ, from the second and the fourth token on; the tokens of an answer are one
    cluster."""
    parity = make_parity()
    merged = served(parity, MERGED)
    others = ((7, 8, 9, 99), (7, 8, 9, 98), (7, 1, 1, 1), *merged.answers[3:])
    distances = (msgspec.structs.replace(merged.distances[0], argmax_differs=2), *merged.distances[1:])
    changed = msgspec.structs.replace(merged, answers=others, distances=distances, losses=(2.1, 2.4, 3.4))
    found = judge_parity(make_parity(**{MERGED: changed})).likenesses[0]
    assert (found.verdict, found.answers, found.first_difference) == ("differ", proportion(3, 8), 4)
    assert (found.tokens.count, found.tokens.of) == (2, 32)
    assert found.loss_difference.low < found.loss_difference.value == pytest.approx(0.4 / 3)
    report = text(make_parity(**{MERGED: changed}), 200)
    assert "answers differ: 3 of 8 differ [8.5 %, 76 %], first at token 4 (median)" in report


def test_differences_as_large_as_the_references_own_are_noise(make_parity):
    """A mode that differs no more than the reference from its repetition is within the noise floor; another is not."""
    parity = make_parity()
    changed_answers = ((7, 8, 9, 99), *served(parity, AGAIN).answers[1:])
    near = served(parity, MERGED).distances
    again = msgspec.structs.replace(served(parity, AGAIN), answers=changed_answers, distances=near)
    merged = msgspec.structs.replace(served(parity, MERGED), answers=changed_answers)
    further = msgspec.structs.replace(
        merged, way="merged into bfloat16", answers=((9,) * 4, (9,) * 4, *merged.answers[2:])
    )
    judgement = judge_parity(make_parity(**{AGAIN: again, MERGED: merged, "merged into bfloat16": further}))
    assert [one.verdict for one in judgement.likenesses] == ["noise", "same", "same", "differ"]
    assert [one.within_floor for one in judgement.likenesses] == [True, True, True, False]


def test_an_adapter_that_changes_nothing_proves_nothing(make_parity):
    """Otherwise a merge that drops the adapter would be called the same."""
    parity = make_parity()
    same = msgspec.structs.replace(served(parity, AGAIN), way=WITHOUT)
    judgement = judge_parity(make_parity(**{WITHOUT: same}))
    assert not judgement.whole
    assert "--epochs" in judgement.trouble
    assert "no verdict can be relied on" in text(make_parity(**{WITHOUT: same}), 200)


@pytest.mark.parametrize("way", [AGAIN, WITHOUT, MERGED])
def test_a_failed_serving_mode_is_a_row_with_its_reason(make_parity, way):
    """A failed control leaves no verdict."""
    failed = ServedAnswers(
        way=way, failure=Failure(phase="parity", kind="OutOfMemoryError", message="it does not fit.")
    )
    parity = make_parity(**{way: failed})
    judgement = judge_parity(parity)
    assert judgement.failures == {way: "OutOfMemoryError: it does not fit"}
    assert not judgement.whole
    assert bool(judgement.trouble) == (way != MERGED)
    assert "no answer: OutOfMemoryError" in text(parity, 200)
    rows = encode_parity(parity, judgement, "x")["ways"]
    assert {row["way"]: row["verdict"] for row in rows}[way] == "failed"


def test_differing_answers_are_shown_side_by_side_with_escaped_text(make_parity):
    """At most three of each mode are shown with escaped text; controls are left out."""
    parity = make_parity()
    merged = msgspec.structs.replace(served(parity, MERGED), answers=tuple((7, 8, 1, 1) for _ in range(8)))
    panels = describe_differing_answers(make_parity(**{MERGED: merged}), lambda tokens: f"\x1b[2J{list(tokens)} [/b]")
    assert len(panels) == 3
    assert panels[0].title == "merged into nf4, prompt 0, from token 3"
    shown = render_text(panels, width=80, coloured=False)
    assert "\x1b[2J" not in shown
    assert "\\x1b[2J[7, 8, 1, 1] [/b]" in shown
    assert describe_differing_answers(parity, str) == ()

"""The rows of a gate in each format."""

from __future__ import annotations

import msgspec
import pytest

from lorameter.report.annotations import gate_annotations
from lorameter.report.comparison import describe_gate
from lorameter.report.render_markdown import markdown_of
from lorameter.report.terminal import text_of
from lorameter.verdicts.baselines import read_comparand
from lorameter.verdicts.compare import compare
from lorameter.verdicts.gate import GateResult, judge, load_policy
from tests.constructed import RUNS


@pytest.fixture(scope="module")
def judged() -> GateResult:
    """A slower run against a sound one, the candidate's name with an escape sequence in it."""
    base, candidate = (read_comparand(str(RUNS / name), RUNS) for name in ("sound", "slower"))
    report = msgspec.structs.replace(compare(base, candidate), candidate="a\x1b[31m|b\r")
    return judge(report, load_policy(None))


def test_every_format_has_the_rows_of_the_others(judged):
    """Variant, metric, ratio and verdict, with the same digits."""
    text = text_of(describe_gate(judged), width=2000, coloured=False)
    markdown, annotations = markdown_of(describe_gate(judged)), gate_annotations(judged)
    (regressed,) = {row.variant for row in judged.report.comparisons if row.verdict == "regressed"}
    ratio = next(line for line in annotations.splitlines() if "regressed" in line and regressed in line)
    ratio = ratio.partition("::")[2].partition("::")[2].partition(" [")[0]
    for written in (text, markdown):
        assert any(regressed in line and ratio in line and "regressed" in line for line in written.splitlines())

"""What sites of one machine cost each other is measured with them: the first alone, and while all others measure."""

from __future__ import annotations

import json

import pytest

from lorameter.verdicts import calibrate


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """A gate's rates are another matter."""
    monkeypatch.setattr(calibrate, "DRAWS", 10)


CALIBRATE = ("--replicates", "6", "--inject-rows", "8", "--json")


@pytest.mark.parametrize(("factor", "verdict"), [(1.05, "regressed"), (1.0, "equivalent")])
def test_a_calibration_on_sites_says_what_neighbours_cost(placed, run, pretended, factor, verdict):
    """By pairs of one round, in its document, on its page, and in a notice of its run."""
    pretended.SLOW[("cpus-0", "beside-")] = factor
    code, last, said = run("calibrate", placed(""), "--sites", "0,1", *CALIBRATE, meeting=2)
    assert code == 0, said
    told = json.JSONDecoder().raw_decode(said[said.index("{") :])[0]["calibration"]["neighbours"]
    assert told["ratio"] == pytest.approx(factor)
    assert (told["verdict"], told["replicates"]) == (verdict, 6)
    (notice,) = (one for one in last.manifest.notices if one.code == "node-interference")
    assert f"a step on the first takes {factor:.2f}" in notice.message
    assert {record.trial for record in last.records} == set(last.manifest.order)
    code, _, said = run("calibrate", "--resume", last.manifest.run)
    assert f"beside neighbours {factor:.2f}" in said

"""Tests that the evidence of each claim confirms it, refutes it or leaves it undecided."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import msgspec
import pytest

from benchmarks.gpu import report
from benchmarks.gpu.claims import CLAIMS
from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.journal import Entry, Journal
from benchmarks.gpu.steps import STEPS

ROOT = Path(__file__).parents[2]
BY_NAME = {claim.name: claim for claim in CLAIMS}
PROFILE = {
    "step": {
        "step": {"value": 0.5}, "remainder": {"low": -0.001, "high": 0.002}, "pairs": 8, "explained": True,
    },
    "categories_s": {"matmul": {"forward": 0.3}, "other": {"forward": 0.001}, "idle": {"forward": 0.5}},
    "ceilings": {"train": {"hfu": {"value": 0.5}, "mfu": {"value": 0.4}}},
}  # fmt: skip
ESTIMATE = {"train": {"measured_bytes": 100, "total_bytes": 105}}
SLOWER = {"metric": "step_time_s", "verdict": "regressed", "ratio": 1.05, "low": 1.04, "high": 1.06}
RATIO = {"verdict": "equivalent", "ratio": 1.0, "low": 0.99, "high": 1.01}
DOCUMENTS = {
    "profile-lora-r16": PROFILE, "profile-qlora-nf4-r16": PROFILE,
    "estimate-lora-r16": ESTIMATE, "estimate-qlora-nf4-r16": ESTIMATE,
    "twins": {"comparisons": [SLOWER], "control": {"train": RATIO}},
    "claims": {"claims": [{"id": "2", "verdict": "supported"}, {"id": "1", "verdict": "not judged"}]},
}  # fmt: skip


class CampaignFolder:
    """The folder of a campaign with the files that its steps write."""

    def __init__(self, folder):
        self.folder = folder
        self.documents = copy.deepcopy(DOCUMENTS)
        self.tests = "".join(
            f'<testcase classname="{file.removesuffix(".py").replace("/", ".")}" name="{name}"/>'
            for file, name in sorted(cited_tests())
        )

    def decide(self, name):
        outputs = self.folder / "outputs"
        outputs.mkdir(exist_ok=True)
        journal = Journal(self.folder)
        for one in STEPS:
            journal.add(Entry(
                step=one.name, outcome="done", code=0, took_s=1.0, begun_unix_s=0.0, device="card", gpu_uuid="u",
                harness="s",
            ))  # fmt: skip
        for step, document in self.documents.items():
            (outputs / f"{step}.out").write_text(json.dumps(document))
        (outputs / "tests-paths.xml").write_text(f"<testsuites><testsuite>{self.tests}</testsuite></testsuites>")
        return BY_NAME[name].decide(Evidence(self.folder, journal))


def cited_tests():
    """Return the pytest names in the sources of the claims."""
    names = {
        cell.cell_contents
        for claim in CLAIMS
        for cell in getattr(claim.judge, "__closure__", None) or ()
        if isinstance(cell.cell_contents, tuple)
    }
    return {tuple(name.split("::")) for group in names for name in group}


@pytest.fixture
def campaign(tmp_path):
    return CampaignFolder(tmp_path)


def test_claims_have_unique_names_and_cite_existing_tests():
    """Claim names are unique, and every test that a claim cites exists."""
    assert len(BY_NAME) == len(CLAIMS)
    assert cited_tests()
    for file, name in cited_tests():
        assert f"def {name}(" in (ROOT / file).read_text(), name


DECIDED_WITHOUT_RUNS = sorted(
    claim.name
    for claim in CLAIMS
    if set(claim.steps).isdisjoint({"sweep", "wrap", "compile", "liger"}) and (claim.steps != ("study",))
)
"""Claims whose judges read no run."""


@pytest.mark.parametrize("name", DECIDED_WITHOUT_RUNS)
def test_expected_evidence_confirms_a_claim(campaign, name):
    """The expected evidence confirms the claim and is quoted."""
    decision = campaign.decide(name)
    assert decision.verdict == "confirmed", decision
    assert decision.evidence


@pytest.mark.parametrize(
    ("name", "step", "change"),
    [
        ("phases, bf16", "profile-lora-r16", {"step": PROFILE["step"] | {"explained": False}}),
        ("kernels of a step", "profile-lora-r16", {"categories_s": {"matmul": {"a": 0.9}, "other": {"a": 0.1}}}),
        ("MFU", "profile-qlora-nf4-r16", {"ceilings": {"train": {"hfu": {"value": 1.2}, "mfu": {"value": 1.0}}}}),
        ("estimate, bf16", "estimate-lora-r16", {"train": {"measured_bytes": 100, "total_bytes": 120}}),
        ("A/A", "twins", {"control": {"train": RATIO | {"verdict": "improved"}}}),
        ("A/B", "twins", {"comparisons": [SLOWER | {"verdict": "inconclusive"}]}),
    ],
)  # fmt: skip
def test_a_document_outside_the_limits_refutes_the_claim(campaign, name, step, change):
    """A document whose values are outside the limits of the claim refutes it."""
    campaign.documents[step] |= change
    assert campaign.decide(name).verdict == "refuted"


@pytest.mark.parametrize(
    ("name", "remove_evidence"),
    [
        ("device start", lambda campaign: None),
        ("phases, bf16", lambda campaign: campaign.documents["profile-lora-r16"]["step"].update(explained=None)),
        ("MFU", lambda campaign: campaign.documents["profile-lora-r16"].update(ceilings={})),
        (
            "estimate, NF4",
            lambda campaign: campaign.documents["estimate-qlora-nf4-r16"]["train"].update(measured_bytes=None),
        ),
        ("estimate, NF4", lambda campaign: campaign.documents.update({"estimate-qlora-nf4-r16": ["another form"]})),
        ("A/A", lambda campaign: campaign.documents["twins"].update(control={})),
        (
            "A/B",
            lambda campaign: campaign.documents["twins"].update(
                comparisons=[SLOWER | {"ratio": 1.01, "verdict": "equivalent"}]
            ),
        ),
        ("LoRA parameters", lambda campaign: campaign.documents["claims"]["claims"][0].update(verdict="inconclusive")),
        ("the study", lambda campaign: None),
        ("wall", lambda campaign: setattr(campaign, "tests", "")),
    ],
)
def test_missing_evidence_decides_nothing(campaign, name, remove_evidence):
    """Evidence that is missing, broken, skipped or malformed leaves the claim undecided and gives the reason."""
    remove_evidence(campaign)
    decision = campaign.decide(name)
    assert decision.verdict == "not decided", decision
    assert decision.evidence


def test_a_failed_test_refutes_and_a_skipped_test_leaves_undecided(campaign):
    """One failed test refutes a claim, and one skipped test leaves it undecided, whatever the other tests' results
    are."""
    case = '<testcase classname="tests.machine.test_gpu" name="test_device_events_agree_with_the_wall"'
    for inner, verdict in (
        ("<failure message='off by 2 %'/>", "refuted"),
        ("<skipped message='no GPU'/>", "not decided"),
    ):
        campaign.tests = f"{case}>{inner}</testcase>"
        decision = campaign.decide("wall")
        assert decision.verdict == verdict
        assert ("off by 2 %" if verdict == "refuted" else "no GPU") in decision.evidence


@pytest.mark.parametrize(("status", "verdict"), [("ok", "confirmed"), ("oom", "refuted")])
def test_the_study_is_judged_by_its_records(campaign, write_run, status, verdict):
    """The claim is confirmed when every trial is ok and every check is active on both bases; any other trial refutes it
    by name."""

    def change(record):
        return msgspec.structs.replace(record, status=status) if record.trial == "r0-plain" else record

    run = write_run("kept", {"plain": [0.1, 0.1], "nf4": [0.1, 0.1]}, control=0.0, change=change)
    (campaign.folder / "runs" / "study").mkdir(parents=True, exist_ok=True)
    run.rename(campaign.folder / "runs" / "study" / "kept")
    decision = campaign.decide("the study")
    assert decision.verdict == verdict, decision
    assert ("r0-plain oom" if status == "oom" else "nf4, plain ok") in decision.evidence


def test_a_rehearsal_decides_nothing(campaign):
    """In a rehearsal every claim is undecided, whatever files exist."""
    decisions = report.decide(CLAIMS, None, rehearsed=True)
    assert {decision.verdict for _, decision in decisions} == {"not decided"}

"""Tests of a measured profile of requests: every part is present and stored."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from lorameter.profile.accounting import request_accounts
from lorameter.profile.evidence import gather_request_evidence
from lorameter.profile.facts import RequestProfile
from lorameter.profile.measure import REQUESTS_DOCUMENT, _start_cold, profile_requests
from lorameter.profile.rules import diagnose_requests
from lorameter.records import codec
from lorameter.records.activity import MERGED_TRACE, REQUEST_PHASES, REQUEST_TRACE
from lorameter.records.record import Failure, PartialRecord, TrialRecord
from lorameter.report.profile import describe_requests
from lorameter.report.terminal import console_for, show
from lorameter.run.workers import WorkerLostError, open_executor
from lorameter.studies.protocol import Protocol
from lorameter.studies.request import TrialRequest
from lorameter.studies.variant import LoraVariant
from lorameter.studies.workload import Workload


@pytest.fixture(scope="module")
def measured(small_study, tmp_path_factory):
    """The profile of the 4-bit variant's requests, and its folder."""
    folder = tmp_path_factory.mktemp("runs")
    protocol = dataclasses.replace(small_study.protocol, step_timeout_s=900)  # for concurrent interpreter starts
    study = dataclasses.replace(small_study, protocol=protocol)
    return profile_requests(study, study.variant("nf4"), open_executor(), runs=folder)


@pytest.mark.selftest
def test_prefill_and_decode_are_separate(measured):
    """Unmerged and merged requests have phases, operators, multiplied and read weights, and shares of the peaks."""
    profile, _ = measured
    for account in request_accounts(profile):
        assert set(account.whole.phases) == set(REQUEST_PHASES)
        assert account.passes == profile.workload.new_tokens - 1
        for one in (account.prefill, account.decode):
            assert one.calls > 0
            assert one.mfu.value > 0  # above 1 if the product that measures the peak uses slower instructions
            assert one.mbu.value > 0
        assert account.prefill.flops > account.decode.flops
    served, merged = request_accounts(profile)
    assert served.decode.calls > merged.decode.calls  # the adapter's products are gone
    assert served.decode.bytes - merged.decode.bytes == profile.facts.size.adapter_bytes


@pytest.mark.selftest
def test_a_stored_profile_gives_the_same_findings(measured, capsys):
    """The stored file gives the same findings; both traces are in the same folder."""
    profile, folder = measured
    again = codec.from_json(
        RequestProfile, json.loads((folder / REQUESTS_DOCUMENT).read_text(encoding="utf-8")), REQUESTS_DOCUMENT
    )
    assert again == profile
    assert all((folder / trace).stat().st_size > 0 for trace in (REQUEST_TRACE, MERGED_TRACE))
    served, merged = request_accounts(again)
    findings = diagnose_requests(gather_request_evidence(again, served, merged))
    show(describe_requests(again, served, merged, findings), console_for())
    shown = capsys.readouterr().out
    for words in ("prefill", "with the adapter merged", "MFU", "MBU", "A cold start", "DynamicCache", "looked for"):
        assert words in shown


class ColdTrial:
    """The parts of a finished trial that a cold start needs."""

    def __init__(self):
        self.request = TrialRequest(
            trial="t", variant=LoraVariant(name="v"), role="variant", replicate=0, seed=1, workload=Workload(),
            protocol=Protocol(), interleaving="replicates", measures=("steps",), device="cpu", threads=1,
            tokens_path="", scratch="", log_path="the.log",
        )  # fmt: skip
        self.record = TrialRecord(
            trial="t", status="ok", name="v", variant="v", role="variant", replicate=0, position=0,
            interleaving="replicates", seed=1, started_unix_s=0.0, wall_time_s=0.0, values={"seen": 1.0},
        )  # fmt: skip
        self.done = []

    def announce(self, command):
        self.done.append(command)

    def add_fragment(self, command, fragment):
        self.record = self.record.merged(fragment)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (True, "the cold start is timeout: WorkerLost: no answer in 600 s."),
        (False, "the cold start is oom: OutOfMemoryError: out of memory."),
        (None, "the cold start is crashed: no message."),
    ],
)
def test_a_cold_start_that_fails_is_a_notice(lost, message):
    """A lost process, and one that reports its failure, do not remove the earlier results."""
    trial = ColdTrial()

    def start_interpreter(log_path, timeout_s, request):
        assert trial.done == ["cold"]
        if lost:
            raise WorkerLostError("timeout", Failure(phase="cold", kind="WorkerLost", message="no answer in 600 s."))
        failure = Failure(phase="cold", kind="OutOfMemoryError", message="out of memory")
        return PartialRecord(status="crashed") if lost is None else PartialRecord().failed("oom", failure)

    _start_cold(trial, SimpleNamespace(start_interpreter=start_interpreter))
    (notice,) = trial.record.notices
    assert (notice.code, notice.message, notice.remedy) == ("no-cold-start", message, "The log is the.log.")
    assert (trial.record.status, trial.record.values) == ("ok", {"seen": 1.0})

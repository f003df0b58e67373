"""`lorameter profile` measures what it prints, and keeps to a limit of time."""

from __future__ import annotations

import os
from typing import ClassVar

import pytest

import lorameter.run.workers.local
from lorameter.cli import main
from lorameter.records.record import PartialRecord
from lorameter.records.worker_info import TokenSummary, WorkerInfo
from lorameter.run.workers import TrialFiles
from lorameter.run.workers.local import LocalExecutor


class FakeExecutor(LocalExecutor):
    """Its process answers at once, keeps what it is asked, and leaves no file."""

    asked: ClassVar[list[tuple[str, dict]]] = []

    def start(self, folder, threads):
        pass

    def hello(self):
        return WorkerInfo(harness="1.0", import_time_s=1.0, device="cpu", torch="0")

    def prepare_tokens(self, workload, *, keep=True):
        return TokenSummary(
            path="t", hash="abc", data="synthetic", synthetic=True, tokenizer_substituted=False, train_sequences=1,
            real_tokens=1, padded_tokens=0, records=1,
        )  # fmt: skip

    def launch(self):
        return self

    def make_place(self, trial, log):
        return TrialFiles(scratch=trial, log_path=os.devnull)

    def ask(self, command, trial, timeout_s, **arguments):
        self.asked.append((command, arguments))
        return PartialRecord()

    def fetch(self, trial, name, folder):
        return folder / name

    def close(self):
        pass


def test_a_profile_of_a_step_asks_for_no_request(tmp_path, monkeypatch, capsys):
    """The step is profiled, and nothing is done that `--phase generate` is for."""
    monkeypatch.setattr(lorameter.run.workers.local, "LocalExecutor", FakeExecutor)
    monkeypatch.setattr(FakeExecutor, "asked", [])
    assert main(["profile", "training-step", "--runs-dir", str(tmp_path)]) == 4  # its process left nothing to be read
    assert "cannot be read" in capsys.readouterr().err
    asked = {command for command, _ in FakeExecutor.asked}
    assert {"profile", "memory_breakdown", "activity", "peak"} <= asked
    assert not [command for command in asked if "generate" in command or "request" in command]


@pytest.mark.parametrize("phase", ["train", "generate"])
def test_pairs_take_half_of_the_time_limit_and_optional_parts_none_after_it(tmp_path, monkeypatch, phase):
    """Of a minute 30 s at most; what does not begin before a limit that has passed is left out, and is named."""
    monkeypatch.setattr(lorameter.run.workers.local, "LocalExecutor", FakeExecutor)
    monkeypatch.setattr(FakeExecutor, "asked", [])
    command = f"profile training-step --phase {phase} --runs-dir {tmp_path}".split()
    main([*command, "--max-minutes", "0.5"])
    timed = "profile" if phase == "train" else "profile_requests"
    budgets = [given["budget_s"] for asked, given in FakeExecutor.asked if asked == timed]
    assert budgets
    assert all(10 < budget < 15 for budget in budgets)
    FakeExecutor.asked.clear()
    main([*command, "--max-minutes", "0.000001"])
    asked = [command for command, _ in FakeExecutor.asked]
    assert {timed, "memory_breakdown"} <= set(asked)
    assert not {"peak", "merge"} & set(asked)
    assert [given["budget_s"] for command, given in FakeExecutor.asked if command == timed] == [0.0]

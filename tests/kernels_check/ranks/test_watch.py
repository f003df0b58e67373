"""Tests of two ranks over gloo under ``watch``: every fault is found on both ranks, and healthy trainings pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels_check

SCRIPT = Path(__file__).with_name("cases.py")
HEALTHY = ("ddp", "four bits", "fsdp2")
ALONE = "nothing ran"
"""Rank 1 does not see a step, and the reason on rank 0 names it."""
PATHS = {"ranks.base", "ranks.adapters", "ranks.gradients", "ranks.steps"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The findings of each case, which are the same on both ranks."""
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99", "GLOO_SOCKET_IFNAME": "lo"}
    commands = [[sys.executable, str(SCRIPT), str(rank), str(meeting)] for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, env=environment, text=True, **pipes) for command in commands]
    by_rank = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        by_rank.append({one["case"]: one["found"] for one in map(json.loads, out.splitlines())})
    assert by_rank[0] == {case: found if case == ALONE else by_rank[1][case] for case, found in by_rank[0].items()}
    return by_rank[0] | {ALONE: [by_rank[0][ALONE], by_rank[1][ALONE]]}


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_training_passes_every_path(found, case):
    """This holds for each strategy, dropout, clipping, accumulation and bits of the base."""
    assert set(found[case]) == PATHS
    assert {status for status, _ in found[case].values()} == {"active"}, found[case]


@pytest.mark.parametrize(
    ("case", "path", "words"),
    [
        ("scales differ", "ranks.base", "the base of rank 1 is another than that of rank 0: 1 of"),
        ("exchanged at first only", "ranks.gradients", "keep each rank's own gradient, which was not exchanged"),
        ("exchanged at first only", "ranks.adapters", "after the step rank 1 has another adapter than rank 0"),
        ("left out later", "ranks.adapters", "a rank left out an update"),
        ("left out later", "ranks.steps", "by the count of its optimizer: rank 0 4, rank 1 3"),
        ("never steps", "ranks.steps", "in the watched steps: rank 0 1, rank 1 0"),
        ("never steps", "ranks.adapters", "rank 1 has another adapter"),
        ("verified without updates", "ranks.steps", "in the watched steps: rank 0 8, rank 1 0"),
    ],
)
def test_a_fault_of_one_rank_is_found_on_both(found, case, path, words):
    """The reason names the rank."""
    status, reason = found[case][path]
    assert status == "fallback", found[case]
    assert words in reason


def test_a_step_that_one_rank_did_not_see_is_unknown_on_both(found):
    """Neither rank waits for the other."""
    for rank, words in enumerate(("rank 1: the model was not called", "the model was not called")):
        for status, reason in found[ALONE][rank].values():
            assert (status, reason.startswith(words)) == ("unknown", True)


def test_parts_that_cannot_be_compared_are_unknown(found):
    """With FSDP1 only the updates are compared."""
    statuses = {path: status for path, (status, _) in found["fsdp1"].items()}
    assert statuses == dict.fromkeys(PATHS, "unknown") | {"ranks.steps": "active"}


def test_one_process_has_no_ranks_to_compare():
    """A requirement about several ranks is not met by one."""
    model = torch.nn.Linear(4, 4)
    with (watched := kernels_check.watch(model, dict.fromkeys(PATHS, True))):
        model(torch.randn(2, 4)).sum().backward()
    checks = {check.path: check for check in watched.checks if check.path in PATHS}
    assert {check.status for check in checks.values()} == {"absent"}

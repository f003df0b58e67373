"""CPUs that are threads of one core are told from those that are not."""

from __future__ import annotations

import itertools
import os

import pytest

from harness.machine.cores import cores_of


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_threads_of_a_core_are_found_by_the_kernels_lists(tmp_path, name):
    """Lists and ranges; a CPU of which nothing is told, nonsense, or what is not about it, is a core of its own."""
    for cpu, said in ((0, "0,3\n"), (3, "0,3\n"), (1, "1-2\n"), (2, "1-2\n"), (4, "?"), (5, "0,3"), (6, "")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / name).write_text(said)
    assert cores_of({7, 6, 5, 4, 3, 2, 1, 0}, tmp_path) == [(0, 3), (1, 2), (4,), (5,), (6,), (7,)]
    assert cores_of({2, 3}, tmp_path) == [(2,), (3,)]


def test_every_cpu_of_this_machine_is_of_one_core():
    """Whatever the kernel tells of it."""
    cpus = sorted(os.sched_getaffinity(0))
    assert sorted(itertools.chain(*cores_of(cpus))) == cpus

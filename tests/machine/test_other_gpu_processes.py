"""Tests of other processes on the GPU: they are distinguished from this run's own, and unknown where a container hides
them."""

from __future__ import annotations

GIB = 2**30
ASK = """
    import dataclasses, os
    from lorameter.machine.gpus import neighbours_of
    from lorameter.machine.nvml import open_device
    with open(os.environ["FAKE_NVML"], "a") as file:
        file.write("0.processes=" + {listed} + "\\n")
    found = neighbours_of(open_device().value, generations={generations})
    report({{one.name: getattr(found, one.name) if one.name == "statement" else
          [getattr(found, one.name).value, getattr(found, one.name).reason] for one in dataclasses.fields(found)}})
"""
ME = 'f"{os.getpid()}:1073741824"'


def ask(listed, generations=0):
    return ASK.format(listed=listed, generations=generations)


def test_a_process_that_is_alone_has_no_neighbours(nvml):
    """Its own memory is known, and no memory is hidden."""
    found = nvml(ask(ME), {"0.used": GIB})
    assert found == {
        "own_bytes": [GIB, ""], "used_bytes": [GIB, ""], "others": [[], ""],
        "others_bytes": [0, ""], "hidden_bytes": [0, ""], "statement": "",
    }  # fmt: skip


def test_others_are_counted_and_their_memory_added(nvml):
    """Process 1 does not belong to the run."""
    found = nvml(ask(ME + ' + ",1:5000"'), {"0.used": GIB + 5000})
    assert found["others"] == [[1], ""]
    assert found["others_bytes"] == [5000, ""]


def test_the_processes_of_the_same_run_are_no_neighbours(nvml):
    """Trials that take turns run concurrently and share an ancestor two generations up."""
    sibling = 'f"{os.getppid()}:7,{os.getpid()}:1073741824"'
    assert nvml(ask(sibling, generations=0))["others"][0] != []
    assert nvml(ask(sibling, generations=1))["others"][0] == []


def test_process_numbers_of_another_container_are_unknown(nvml):
    """Foreign process ids cannot be distinguished from this process's own, so that the values are unknown and not
    zero."""
    found = nvml(ask('"999999999:5000,999999998:6000"'), {"0.used": 11000})
    for name in ("own_bytes", "others", "others_bytes"):
        value, reason = found[name]
        assert value is None
        assert "mean nothing in this container" in reason
    assert "mean nothing in this container" in found["statement"]


def test_memory_without_a_listed_process_shows_hidden_processes(nvml):
    """The list is empty although 3 GiB are in use."""
    found = nvml(ask('""'), {"0.used": 3 * GIB})
    assert found["hidden_bytes"] == [3 * GIB, ""]
    assert found["statement"].startswith("3 GiB of device memory are in use and no listed process holds them")

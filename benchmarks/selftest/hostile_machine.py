"""Doors of what the machine says: files of the kernel's, variables of the environment, and other interpreters."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import hostile
from hostile_door import RefusedError

from harness.machine.host import HostWatch
from harness.machine.system import settings, system_facts
from harness.machine.visible import VARIABLE, visible_devices
from harness.models.catalogue import cache_dir
from harness.records import store
from harness.run.executors.host import read_answer
from kernels_check.visible import make_visible

CPU = "sys/devices/system/cpu"
NUMBERS = (
    "", "0", "-1", "max", "nan", "inf", "x", "9" * 400, "9" * 5000, "1e999", "0-99999999999", "\x1b[2J", "\udcff",
    "1.5", ":", "a:b", "..", "/" * 300, "x" * 5000, "[", "18446744073709551616",
)  # fmt: skip


def kernels() -> list[bytes]:
    """Files as Linux writes them, of either version of cgroups."""
    cpus = "".join(f"cpu{n} 100 1 50 1000 5 1 2 3 0 0\n" for n in range(os.cpu_count() or 1))
    common = {
        "proc/stat": f"cpu  100 1 50 1000 5 1 2 3 0 0\n{cpus}intr 1 2 3\nctxt 5\n",
        "proc/meminfo": "MemTotal: 65536 kB\nMemFree: 512 kB\nMemAvailable: 4096 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n",
        "proc/loadavg": "0.50 0.40 0.30 1/100 1234\n",
        "proc/vmstat": "nr_free_pages 5\npswpin 3\npswpout 4\n",
        "proc/pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\nfull avg10=0.00 total=1\n",
        "proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n",
        "proc/pressure/io": "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "sys/devices/system/node/node0/cpulist": "0-1\n",
        f"{CPU}/cpu0/cpufreq/scaling_governor": "performance\n",
        f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "2000000\n",
        f"{CPU}/intel_pstate/no_turbo": "1\n",
    }
    second = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/a/b/cpu.stat": "usage_usec 5\nthrottled_usec 1\n",
        "sys/fs/cgroup/a/b/memory.max": "1000000\n",
        "sys/fs/cgroup/a/b/memory.current": "5000\n",
        "sys/fs/cgroup/a/b/memory.stat": "inactive_file 5\n",
    }
    first = {
        "proc/self/cgroup": "3:cpu,cpuacct:/a\n2:memory:/a\n",
        "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu/a/cpu.stat": "nr_periods 1\nthrottled_time 5\n",
        "sys/fs/cgroup/cpuacct/a/cpuacct.usage": "7\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1000000\n",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "5000\n",
        "sys/fs/cgroup/memory/a/memory.stat": "total_inactive_file 5\n",
    }
    return [json.dumps(common | own).encode() for own in (second, first)]


def spoil_kernel(source: random.Random, content: bytes) -> bytes:
    """Words of one to three of the files replaced, or the files cut short or taken away."""
    files = json.loads(content)
    for _ in range(source.randint(1, 3)):
        name = source.choice(list(files))
        text, kind = files[name], source.randrange(6)
        if kind == 0:
            files[name] = text[: source.randint(0, len(text))]
        elif kind == 1 and len(files) > 1:
            del files[name]
        else:
            cut = source.choice((" ", ":", "\n"))
            words = text.split(cut)
            words[source.randrange(len(words))] = source.choice(NUMBERS)
            files[name] = cut.join(words)
    return json.dumps(files).encode()


def enter_kernel(folder: Path, content: bytes) -> str:
    """A machine with these files; what is asked of it before, beside and after a measurement."""
    for name, text in json.loads(content).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    facts = system_facts(folder)
    watch = HostWatch(folder)
    for _ in range(2):
        watch.begin()
        watch.end()
    said = settings(card=False, root=folder)
    return make_visible(json.dumps(said) + str(facts))


def answers() -> list[bytes]:
    """What an interpreter says of itself."""
    answer = {
        "python": "3.11.7",
        "executable": "/bin/python",
        "packages": {"torch": "2.13"},
        "origins": {"torch": None},
    }
    return [json.dumps(answer).encode()]


def enter_answer(folder: Path, content: bytes) -> str:
    """What an interpreter has printed."""
    answer = read_answer(content.decode("utf-8", errors="replace"))
    if answer is None:
        raise RefusedError
    return make_visible(" ".join((answer["python"], answer["executable"], *answer["packages"])))


def lists() -> list[bytes]:
    """What names cards."""
    return [b"0,1", b"GPU-8d1f3c5a,MIG-1", b"-1", b""]


def spoil_list(source: random.Random, content: bytes) -> bytes:
    """Entries put together; or the bytes."""
    if source.random() < 0.3:
        return hostile.spoil_bytes(source, content)
    entries = ("0", "1", "GPU-8d1f3c5a", "MIG-1", *NUMBERS, "²", "١", "GPU-", " 1 ")
    return ",".join(source.choice(entries) for _ in range(source.randint(0, 4))).encode(errors="surrogateescape")


def enter_variable(folder: Path, content: bytes) -> str:
    """The value of a variable that is read here."""
    text = content.decode("utf-8", errors="surrogateescape").replace("\0", "")
    devices = visible_devices({VARIABLE: text})
    os.environ |= {"LORAMETER_CACHE": text, store.ENV_RUNS: str(folder / "runs")}
    return make_visible(f"{devices} {cache_dir()} {store.runs_dir(None)}")

"""The machine and the software of a run: enough to repeat it, and the part that must agree to compare two runs.

Nothing here imports torch: the parent stays light, and what torch itself sees comes from the worker's greeting. A
library, counter or permission that is missing makes a value None, never an exception.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorameter.errors import UsageError
from lorameter.machine.nvml import device_session
from lorameter.machine.reading import Reading
from lorameter.machine.repository import git_state
from lorameter.machine.software import (
    KERNELS,
    MAIN_LIBRARIES,
    cuda_of,
    installed_packages,
    kernel_libraries,
    normal_name,
    switches_of,
)
from lorameter.machine.system import memory_available_bytes, memory_bytes, settings
from lorameter.records import codec
from lorameter.records.worker_info import WorkerInfo
from lorameter.studies import data_source
from lorameter.studies.script import OWN
from lorameter.studies.study import Study
from lorameter.studies.workload import Workload

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "flash-attn",
    "triton",
    "numpy",
    "lorameter",
)
FINGERPRINT = ("device", "device_name", "driver", "cuda", "cpu_model", "threads", "python", "libraries", "workload")
"""Fields of the provenance that must agree for two runs to be compared."""
POWER_LIMIT = "power_limit_w"
"""A further field, of runs on a GPU: its power limit in force, in whole watts, if known."""
OF_A_KIND = ("device_name", "driver", "cpu_model", POWER_LIMIT)
"""Fields of the fingerprint in which machines that have the same installed are of different kinds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine as far as it can be known without touching its device."""

    device: str
    """"cuda" if torch is a CUDA build and NVML shows a device, else "cpu"."""
    device_name: str
    device_memory_bytes: int | None
    driver: str | None
    cuda: str | None
    cpu_model: str
    cpus: int
    memory_bytes: int
    """Of the machine, or the limit of a container where that is less."""
    avx512_bf16: bool
    """On such CPUs bitsandbytes repacks 4-bit weights and needs widths that its blocks divide."""
    kernel: str
    python: str

    @property
    def kind(self) -> str:
        """The key that chooses the profile of a study: "cpu", or the name of the GPU."""
        return "cpu" if self.device == "cpu" else self.device_name

    @property
    def hardware(self) -> str:
        """For a reader: its CPU, or its GPU and CPU."""
        return self.cpu_model if self.device == "cpu" else f"{self.device_name} and {self.cpu_model}"


def probe_machine(environment: Mapping[str, str] | None = None) -> Machine:
    """Read /proc, NVML and the installed torch's version file; `environment` as that of `device_id`."""
    cpu = _cpu_fields()
    cuda = _torch_cuda()
    name = cpu.get("model name", platform.processor() or platform.machine())
    facts, memory = _describe_gpu(environment)
    return Machine(
        device="cuda" if facts else "cpu",
        device_name=(facts["name"].value or "a device without a name") if facts else name,
        device_memory_bytes=None if memory is None else int(memory.total),
        driver=facts["driver"].value if facts else None,
        cuda=cuda,
        cpu_model=name,
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=memory_bytes().value or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        avx512_bf16="avx512_bf16" in cpu.get("flags", "").split(),
        kernel=platform.release(),
        python=platform.python_version(),
    )


def origin_of(folder: Path) -> str:
    """Machine, libraries and the commit of a folder in a line, for the head of figures that are printed."""
    machine, git = probe_machine(), git_state(folder)
    versions = ", ".join(f"{name} {library_version(name) or 'not installed'}" for name in MAIN_LIBRARIES)
    changes = " with local changes" if git["dirty"] else ""
    commit = f"commit {git['commit'][:10]}{changes}" if git["commit"] else "no repository"
    return (
        f"machine: {machine.device_name}, {machine.cpus} CPUs, {machine.memory_bytes / 2**30:.0f} GiB, "
        f"{machine.device}; Python {machine.python}, {versions}; {commit}"
    )


def device_id(environment: Mapping[str, str] | None = None) -> str:
    """What a worker measures on here: "cpu", or the UUID of its GPU; its name if that is unknown. `environment`
    is that of the worker; None for this process's."""
    facts, _ = _describe_gpu(environment)
    return str(facts["uuid"].value or facts["name"].value or "gpu") if facts else "cpu"


def _describe_gpu(environment: Mapping[str, str] | None) -> tuple[dict[str, Reading[Any]], Any]:
    """Facts and memory of the device that a worker will use; empty and None where torch is a CPU build, or NVML finds
    no device."""
    if not _torch_cuda():
        return {}, None
    with device_session(environment) as gpu:
        return ({}, None) if gpu.value is None else (gpu.value.facts(), gpu.value.memory().value)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """The place where trials run: the machine, its settings and its installed packages."""

    machine: Machine
    settings: dict[str, Any]
    """As of `lorameter.machine.system.settings`."""
    libraries: dict[str, str | None]
    git: dict[str, Any]
    """Commit and dirty flag of the repository that the trials run in."""
    host: dict[str, Any] | None = None
    """Description of the interpreter that trials run in (`lorameter.run.workers.environment.describe`), where it is not
    the present one; its values replace those here."""
    packages: dict[str, str] = field(default_factory=dict)
    """All distributions of the present interpreter, with their versions."""
    switches: dict[str, str] = field(default_factory=dict)
    """Variables of the present environment that steer the choice of kernels."""


def read_facts(
    machine: Machine, host: dict[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> MachineFacts:
    """The facts of this machine; `host` describes the interpreter that trials run in, None for the present one, and
    `environment` says which GPU they see first."""
    return MachineFacts(
        machine=machine,
        settings=settings(gpu=machine.device == "cuda", environment=environment),
        libraries={name: library_version(name) for name in LIBRARIES},
        git=git_state(Path.cwd()),
        host=host,
        packages=installed_packages(),
        switches=switches_of(os.environ),
    )


def collect(
    study: Study,
    facts: MachineFacts,
    threads: int,
    hello: WorkerInfo | None = None,
    own_workloads: Mapping[str, Workload] | None = None,
) -> dict[str, Any]:
    """The provenance of a run: machine and its settings, threads, library versions, workload, git state, and what the
    worker reported, if one was started. `facts` are those of where the trials run, `own_workloads` those of variants
    that are not measured on the study's, by name."""
    return {
        "threads": threads,
        "workload": _content_of_workloads(study.workload, own_workloads or {}),
        "worker": {key: getattr(hello, key, None) for key in ("device", "torch", "import_time_s", "harness")},
        **place_of(facts),
        **_engine(study, facts),
    }


def place_of(facts: MachineFacts) -> dict[str, Any]:
    """The part of the provenance that does not depend on a study."""
    host = dict(facts.host or {})
    steering = {"packages": facts.packages, "cuda": facts.machine.cuda, "switches": facts.switches} | host
    host.pop("switches", None)
    kernels = {KERNELS: kernel_libraries(steering["packages"], steering["cuda"], steering["switches"])}
    return {
        **codec.to_json(facts.machine),
        "settings": facts.settings,
        "libraries": facts.libraries,
        "git": facts.git,
        **host,
        **(kernels if facts.machine.device == "cuda" else {}),
    }


def _engine(study: Study, facts: MachineFacts) -> dict[str, Any]:
    """The version of what a study's engine comes with, where no other field has it."""
    package = "" if study.engine is None else study.engine.package
    if not package or package in LIBRARIES:
        return {}
    packages: Mapping[str, str] = facts.packages if facts.host is None else facts.host.get("packages", {})
    return {"engine": {package: packages.get(normal_name(package))}}


def harness_identity() -> str:
    """Version and content of the harness that runs this: the two sides of an A/B may run different code.

    The content is a hash of the package's sources and data by their names inside it, so it does not depend on the
    folder of the package.
    """
    root = Path(__file__).parents[1]  # the whole package
    sources = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*")
        if path.suffix in (".py", ".json", ".toml") and path.is_file()
    }
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(f"{name}\0".encode() + hashlib.sha256(sources[name].read_bytes()).digest())
    return f"{library_version('lorameter') or 'not installed'} sha256:{digest.hexdigest()[:12]}"


def differing_packages(
    base: Mapping[str, Any], candidate: Mapping[str, Any]
) -> dict[str, tuple[str | None, str | None]]:
    """The distributions whose versions differ, to which an effect can be attributed, with both (None: not installed).

    `base` and `candidate` are descriptions of two hosts (`lorameter.run.workers.environment.describe`).
    """
    ours, theirs = base["packages"], candidate["packages"]
    return {
        name: (ours.get(name), theirs.get(name))
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    }


def _content_of_workloads(common: Workload, own: Mapping[str, Workload]) -> dict[str, Any]:
    """The study's workload, and under `own` what variants are measured on instead."""
    data = {"data": _content_of(common.data)}
    others = {name: codec.to_json(workload) | data for name, workload in own.items()}
    return {**codec.to_json(common), **data, **({"own": others} if others else {})}


def _content_of(data: str) -> str:
    """The identity of the data without its path: the hash of a file or of a folder's files; else the name."""
    if data == OWN:
        return data
    try:
        source = data_source.resolve(data)
    except UsageError:  # which the reader of the data reports
        return data
    if not source.files:
        return data
    digests = [_digest_of(path) for path in source.files]
    if source.kind == "file":
        return f"{source.label} sha256:{digests[0][:16]}"
    return f"{source.label} sha256:{hashlib.sha256(' '.join(digests).encode()).hexdigest()[:16]}"


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_fields(provenance: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """The fields that must agree for two runs to be compared; `without` are those that an A/B declares."""
    fields = {key: provenance.get(key) for key in FINGERPRINT}
    of_gpu = {POWER_LIMIT: power_limit_w(provenance), KERNELS: provenance.get(KERNELS)}
    known = fields | {key: value for key, value in of_gpu.items() if value is not None}
    return {key: value for key, value in known.items() if key not in without}


def fingerprint(provenance: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Hash of the fields that must agree for two runs to be compared; `without` are those that an A/B declares."""
    compared = codec.dumps(fingerprint_fields(provenance, without))
    return hashlib.sha256(compared.encode(errors="backslashreplace")).hexdigest()[:12]


def power_limit_w(provenance: Mapping[str, Any], which: str = "power_limit_w") -> int | None:
    """The GPU's power limit in force in whole watts, or that by default (`default_power_limit_w`).

    None on a CPU, and where the GPU does not report it.
    """
    gpu = provenance.get("settings", {}).get("gpu")
    limit = gpu.get(which) if isinstance(gpu, Mapping) else None
    return round(limit) if isinstance(limit, int | float) and math.isfinite(limit) else None


def library_version(library: str) -> str | None:
    """The installed version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_fields() -> dict[str, str]:
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields


def _torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for, read from its version file."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else cuda_of(Path(spec.origin).parent)


def free_bytes(machine: Machine, environment: Mapping[str, str] | None = None) -> int | None:
    """Memory that processes could take on the measuring device now, or in a container with a limit what that leaves.

    None where NVML or the kernel does not say.
    """
    if machine.device != "cuda":
        return memory_available_bytes().value
    _, memory = _describe_gpu(environment)
    return None if memory is None else int(memory.free)

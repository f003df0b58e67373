"""The machine, the software and the repository of a run: the data to repeat it, and the part that two comparable runs
must share.

This module does not import torch, so that the parent stays light; facts from torch come with the worker's first
message. A missing library, counter or permission makes a value None and never raises an exception.

Git hooks export variables that direct every git command to the hook's repository, regardless of the working folder.
They are removed here, so that a run started by a hook reads the intended repository.

Versions of packages are read without importing modules. torch chooses among the algorithms of cuDNN and cuBLAS, which
are separate packages that can be replaced independently, and both read the environment:
`TORCH_CUDNN_SDPA_DEPRIORITIZED` makes torch prefer other attention kernels, `NVIDIA_TF32_OVERRIDE` overrides the format
of all float32 products, and `PYTORCH_ALLOC_CONF` (formerly `PYTORCH_CUDA_ALLOC_CONF` and `PYTORCH_HIP_ALLOC_CONF`)
controls how the allocator reserves memory. Two runs that differ in any of these are different measurements.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorameter.errors import UsageError
from lorameter.machine.describe_env import installed_packages
from lorameter.machine.host import memory_available_bytes, memory_bytes, settings
from lorameter.machine.nvml import device_session
from lorameter.machine.reading import Reading, parse_fields, read_file
from lorameter.records import codec
from lorameter.records.fileio import hash_file
from lorameter.records.record import WorkerInfo
from lorameter.studies import workload
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
"""A further field for runs on a GPU: the power limit in force, in whole watts, if known."""
HARDWARE_FIELDS = ("device_name", "driver", "cpu_model", POWER_LIMIT)
"""Fields of the fingerprint in which machines with the same software may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine, as far as it can be described without using its device."""

    device: str
    """"cuda" if torch is a CUDA build and NVML shows a device, else "cpu"."""
    device_name: str
    device_memory_bytes: int | None
    driver: str | None
    cuda: str | None
    cpu_model: str
    cpus: int
    memory_bytes: int
    """Memory of the machine, or the limit of a container if that is lower."""
    avx512_bf16: bool
    """On such CPUs bitsandbytes repacks 4-bit weights, and requires widths divisible by its blocks."""
    kernel: str
    python: str
    capability: tuple[int, int] | None = None
    """Compute capability of the GPU, if known."""
    gflops: dict[str, float] = field(default_factory=dict)
    """Rate of a matrix product on the CPU by dtype (`lorameter.machine.products`); empty if it was not measured."""

    @property
    def kind(self) -> str:
        """The key that selects the profile of a study: "cpu", or the name of the GPU."""
        return "cpu" if self.device == "cpu" else self.device_name

    @property
    def hardware(self) -> str:
        """Its CPU, or its GPU and CPU, as text for users."""
        return self.cpu_model if self.device == "cpu" else f"{self.device_name} and {self.cpu_model}"


def probe_machine(environment: Mapping[str, str] | None = None) -> Machine:
    """Read /proc, NVML and the installed torch's version file; `environment` as for `device_id`."""
    cpu = read_file(Path("/proc/cpuinfo"), parse_fields, "").value or {}
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
        capability=facts["capability"].value if facts else None,
    )


def describe_origin(folder: Path) -> str:
    """Machine, libraries and the commit of a folder on one line, as a header for printed figures."""
    machine, git = probe_machine(), git_state(folder)
    versions = ", ".join(f"{name} {library_version(name) or 'not installed'}" for name in MAIN_LIBRARIES)
    changes = " with local changes" if git["dirty"] else ""
    commit = f"commit {git['commit'][:10]}{changes}" if git["commit"] else "no repository"
    return (
        f"machine: {machine.device_name}, {machine.cpus} CPUs, {machine.memory_bytes / 2**30:.0f} GiB, "
        f"{machine.device}; Python {machine.python}, {versions}; {commit}"
    )


def device_id(environment: Mapping[str, str] | None = None) -> str:
    """The device on which a worker measures: "cpu", or the UUID of its GPU (its name if that is unknown). `environment`
    is that of the worker; None for this process's."""
    facts, _ = _describe_gpu(environment)
    return str(facts["uuid"].value or facts["name"].value or "gpu") if facts else "cpu"


def _describe_gpu(environment: Mapping[str, str] | None) -> tuple[dict[str, Reading[Any]], Any]:
    """Facts and memory of a worker's device; empty and None if torch is a CPU build, or NVML finds no device."""
    if not _torch_cuda():
        return {}, None
    with device_session(environment) as gpu:
        return ({}, None) if gpu.value is None else (gpu.value.facts(), gpu.value.memory().value)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """The place in which trials run: the machine, its settings and its installed packages."""

    machine: Machine
    settings: dict[str, Any]
    """Result of `lorameter.machine.host.settings`."""
    libraries: dict[str, str | None]
    git: dict[str, Any]
    """Commit and dirty flag of the repository in which the trials run."""
    host: dict[str, Any] | None = None
    """Description of the trials' interpreter (`lorameter.run.workers.environment.describe`), if it is not the current
    one; its values replace those here."""
    packages: dict[str, str] = field(default_factory=dict)
    """All distributions of the current interpreter, with their versions."""
    switches: dict[str, str] = field(default_factory=dict)
    """Variables of the current environment that affect the choice of kernels."""


def read_facts(
    machine: Machine, host: dict[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> MachineFacts:
    """The facts of this machine; `host` describes the trials' interpreter (None for the current one), and `environment`
    defines the GPU that they see first."""
    return MachineFacts(
        machine=machine,
        settings=settings(gpu=machine.device == "cuda", environment=environment),
        libraries={name: library_version(name) for name in LIBRARIES},
        git=git_state(Path.cwd()),
        host=host,
        packages=installed_packages(),
        switches=kernel_switches(os.environ),
    )


def collect(
    study: Study,
    facts: MachineFacts,
    threads: int,
    hello: WorkerInfo | None = None,
    own_workloads: Mapping[str, Workload] | None = None,
) -> dict[str, Any]:
    """The provenance of a run: machine and its settings, threads, library versions, workload, git state, and the
    worker's report, if one was started. `facts` are those of the trials' place; `own_workloads` those of variants that
    do not use the study's workload, by name."""
    host = facts.host or {}
    found = {"packages": facts.packages, "cuda": facts.machine.cuda, "switches": facts.switches} | host
    kernels = {KERNELS: kernel_libraries(found["packages"], found["cuda"], found["switches"])}
    package = "" if study.engine is None else study.engine.package
    engine = {"engine": {package: found["packages"].get(normal_name(package))}}  # its version, if no other field has it
    return {
        "threads": threads,
        "workload": _content_of_workloads(study.workload, own_workloads or {}),
        "worker": {key: getattr(hello, key, None) for key in ("device", "torch", "import_time_s", "harness")},
        **codec.to_json(facts.machine),
        "settings": facts.settings,
        "libraries": facts.libraries,
        "git": facts.git,
        **{key: value for key, value in host.items() if key != "switches"},
        **(kernels if facts.machine.device == "cuda" else {}),
        **(engine if package and package not in LIBRARIES else {}),
    }


def harness_identity() -> str:
    """Version and content of the running harness: the two sides of an A/B may run different code.

    The content is a hash of the package's sources and data with their relative names, so it does not depend on the
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
    """The distributions whose versions differ, to which an effect can be attributed, with both versions (None: not
    installed).

    `base` and `candidate` are descriptions of two hosts (`lorameter.run.workers.environment.describe`).
    """
    ours, theirs = base["packages"], candidate["packages"]
    return {
        name: (ours.get(name), theirs.get(name))
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    }


def _content_of_workloads(common: Workload, own: Mapping[str, Workload]) -> dict[str, Any]:
    """The study's workload, and under `own` the workloads of variants that use another one."""
    data = {"data": _content_of(common.data)}
    others = {name: codec.to_json(workload) | data for name, workload in own.items()}
    return {**codec.to_json(common), **data, **({"own": others} if others else {})}


def _content_of(data: str) -> str:
    """The identity of the data, independent of its path: the hash of a file or of a folder's files; else the name."""
    if data == OWN:
        return data
    try:
        source = workload.resolve(data)
    except UsageError:  # the reader of the data reports it
        return data
    if not source.files:
        return data
    digests = [hash_file(path) for path in source.files]
    if source.kind == "file":
        return f"{source.label} sha256:{digests[0][:16]}"
    return f"{source.label} sha256:{hashlib.sha256(' '.join(digests).encode()).hexdigest()[:16]}"


def fingerprint_fields(provenance: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """The fields that must agree for two runs to be compared; `without` are the fields in which an A/B declares a
    difference."""
    fields = {key: provenance.get(key) for key in FINGERPRINT}
    of_gpu = {POWER_LIMIT: power_limit_w(provenance), KERNELS: provenance.get(KERNELS)}
    known = fields | {key: value for key, value in of_gpu.items() if value is not None}
    return {key: value for key, value in known.items() if key not in without}


def fingerprint(provenance: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Hash of the fields that must agree for two runs to be compared; `without` are the fields in which an A/B declares
    a difference."""
    compared = codec.dumps(fingerprint_fields(provenance, without))
    return hashlib.sha256(compared.encode(errors="backslashreplace")).hexdigest()[:12]


def power_limit_w(provenance: Mapping[str, Any], which: str = "power_limit_w") -> int | None:
    """The GPU's power limit in force in whole watts, or the default limit (`default_power_limit_w`).

    None on a CPU, and if the GPU does not report it.
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


def _torch_cuda() -> str | None:
    """The CUDA version for which the installed torch was built, read from its version file."""
    spec = importlib.util.find_spec("torch")
    return None if spec is None or spec.origin is None else built_cuda_version(Path(spec.origin).parent)


def free_bytes(machine: Machine, environment: Mapping[str, str] | None = None) -> int | None:
    """Memory available now to processes on the measuring device, or below the limit of a container.

    None if NVML or the kernel does not report it.
    """
    if machine.device != "cuda":
        return memory_available_bytes().value
    _, memory = _describe_gpu(environment)
    return None if memory is None else int(memory.free)


_POINTERS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY")
STATE_TIMEOUT_S = 10.0
"""A repository on an unresponsive network disk must not delay a run just to read its commit."""


def run_git(folder: Path, *arguments: str, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a git command in a folder. The result has code 127 and the reason if git cannot be run or does not end within
    `timeout_s`.

    Ctrl-C in the terminal reaches only the parent, which may need git for the cleanup. A read-only call takes no lock:
    git would otherwise rewrite the index, and if it is killed then, or the disk is full, it leaves a lock that blocks
    the user's later commits.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _POINTERS}
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=timeout_s,
            check=False,
            start_new_session=True,
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", f"git cannot be run: {error.strerror}")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 127, "", f"git did not answer within {timeout_s:g} s")


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and dirty flag of the repository around `folder`; None if there is none. Bytecode does not count as a
    change."""
    commit = run_git(folder, "rev-parse", "HEAD", timeout_s=STATE_TIMEOUT_S)
    if commit.returncode:
        return {"commit": None, "dirty": None}
    bytecode = ":(top,exclude,glob)**/__pycache__/**"
    changes = run_git(folder, "status", "--porcelain", "--", ":/", bytecode, timeout_s=STATE_TIMEOUT_S)
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}


KERNELS = "kernels"
"""Key of `kernel_libraries` in the provenance of a run on a GPU."""
MAIN_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
"""Libraries whose versions are shown with each run, and are columns of its tables."""
SWITCHES = re.compile(r"TORCH_CUDNN_SDPA_\w+|PYTORCH_(\w+_)?ALLOC_CONF|NVIDIA_TF32_OVERRIDE", re.ASCII)


def normal_name(distribution: str) -> str:
    """A distribution's normalised name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def own_software(cuda: str | None) -> dict[str, str]:
    """The packages and the `python` of this process; `cuda` is the CUDA version of its torch, or None."""
    return installed_packages() | {"python": platform.python_version()} | ({"cuda": cuda} if cuda else {})


def built_cuda_version(torch: Path) -> str | None:
    """The CUDA version for which the torch in this folder was built, None for a CPU build."""
    with contextlib.suppress(OSError):
        found = re.search(r"^cuda.*'(.+)'", (torch / "version.py").read_text(), re.MULTILINE)
        return found and found[1]
    return None


def kernel_switches(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that affect the choice of kernels, by name."""
    return {name: environment[name] for name in sorted(environment) if SWITCHES.fullmatch(name)}


def kernel_libraries(packages: Mapping[str, str], cuda: str | None, switches: Mapping[str, str]) -> dict[str, Any]:
    """Versions of the libraries that provide torch's kernels, None if unknown, and the switches.

    Args:
        packages: versions of distributions by their normalised names.
        cuda: the CUDA version of torch; distributions for several versions may be installed.
        switches: the result of `kernel_switches`.
    """
    of = f"-cu{cuda.partition('.')[0]}" if cuda else ""
    versions = {
        library: packages.get(f"nvidia-{library}{of}", packages.get(f"nvidia-{library}"))
        for library in ("cudnn", "cublas")
    }
    return {**versions, "switches": dict(switches)}

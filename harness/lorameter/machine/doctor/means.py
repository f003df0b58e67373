"""What can run here: packages, device, memory, and the models that fit."""

from __future__ import annotations

from collections.abc import Iterator

from lorameter.machine.doctor.check import DoctorCheck, say
from lorameter.machine.doctor.survey import OPTIONAL, REQUIRED, Survey
from lorameter.machine.visible_gpus import ORDER_VARIABLE, counts_along_the_bus
from lorameter.models import catalogue, shapes
from lorameter.models.costs.memory import bare_process_bytes, birth_bytes, estimate_memory
from lorameter.records.units import format_bytes
from lorameter.studies.variant import Variant
from lorameter.studies.workload import Workload


def packages(found: Survey) -> Iterator[DoctorCheck]:
    """What must be installed, and what may be."""
    lacking = [name for name in REQUIRED if found.packages.get(name) is None]
    versions = ", ".join(f"{name} {found.packages[name]}" for name in REQUIRED if name not in lacking)
    if lacking:
        said, remedy = f"missing: {', '.join(lacking)}; installed: {versions}", f"pip install {' '.join(lacking)}"
        yield DoctorCheck(about="runs", name="packages", standing="unfit", found=said, remedy=remedy)
    else:
        yield DoctorCheck(about="runs", name="packages", standing="good", found=versions)
    for name, need in OPTIONAL.items():
        if found.packages.get(name) is None:
            said, remedy = f"{name} is not installed", f"Only for {need}: pip install 'lorameter[{name}]'."
            yield DoctorCheck(about="runs", name=name, standing="note", found=said, remedy=remedy)


def device(found: Survey) -> Iterator[DoctorCheck]:
    """Where trials run, and whether that is where the user thinks."""
    machine, card = found.machine, found.card.value
    if machine.device == "cuda":
        size = "" if machine.device_memory_bytes is None else f", {format_bytes(machine.device_memory_bytes)}"
        said = f"{machine.device_name}{size}, driver {machine.driver}; torch is built for CUDA {machine.cuda}"
        if found.lacks_driver is None:
            yield DoctorCheck(about="runs", name="device", standing="good", found=said)
        else:
            yield DoctorCheck(
                about="runs",
                name="device",
                standing="unfit",
                found=f"{said}; NVML shows the GPU, and CUDA's driver cannot be loaded: {found.lacks_driver}",
                remedy="Start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility, or install all of the "
                "driver.",
            )
    elif card is not None:
        yield DoctorCheck(
            about="runs",
            name="device",
            standing="bad",
            found=f"{say(card.facts.name, str)} is there, and torch is built for CPUs: trials run on the CPU",
            remedy="Install torch for CUDA (pytorch.org, Get Started), or set CUDA_VISIBLE_DEVICES= to mean the CPU.",
        )
    elif machine.cuda is not None:
        yield DoctorCheck(
            about="runs",
            name="device",
            standing="note",
            found=f"{machine.cpu_model}: torch is built for CUDA {machine.cuda}, and no GPU is found "
            f"({found.card.reason})",
            remedy="If there should be one, look at nvidia-smi, CUDA_VISIBLE_DEVICES and docker run --gpus.",
        )
    else:
        bf16 = "with" if machine.avx512_bf16 else "without"
        said = f"{machine.cpu_model} {bf16} AVX512-BF16, {machine.cpus} CPUs; torch is built for CPUs"
        yield DoctorCheck(about="runs", name="device", standing="good", found=said)
    names = found.cards.value or ()
    if len(set(names)) > 1 and not counts_along_the_bus(found.environment):
        yield DoctorCheck(
            about="runs",
            name="device order",
            standing="note",
            found=f"GPUs differ ({', '.join(names)}): CUDA puts the fastest first, trials count along the bus",
            remedy=f"Choose by UUID (nvidia-smi -L) in CUDA_VISIBLE_DEVICES, or set {ORDER_VARIABLE}=PCI_BUS_ID.",
        )


def memory(found: Survey) -> Iterator[DoctorCheck]:
    """Whether one trial's process would fit."""
    free, least = found.system.memory_available_bytes, bare_process_bytes(found.machine.cuda)
    little = free.value is not None and free.value < least
    needed = f"a trial's process takes {format_bytes(least)} before its model"
    yield DoctorCheck(
        about="runs",
        name="memory",
        standing="unfit" if little else "good" if free.known else "note",
        found=say(free, lambda size: f"{format_bytes(size)} free; {needed}"),
        remedy="Free memory, or raise the container's limit." if little else "",
    )


def models(found: Survey) -> Iterator[DoctorCheck]:
    """Which models of the catalogue fit into what is free, by `lorameter.models.costs.memory`."""
    card, workload = found.card.value, Workload()
    if card is not None and found.machine.device == "cuda":
        free, where = card.memory.then(lambda told: told.free), "cuda"
    else:
        free, where = found.system.memory_available_bytes, "cpu"
    if free.value is None:
        return
    room = free.value
    plain, packed = (
        _fitting(Variant(name=how, quantization=how), where, room, birth_bytes(found.machine.cuda))
        for how in ("none", "nf4")
    )
    more = [name for name in packed if name not in plain]
    yield DoctorCheck(
        about="runs",
        name="models",
        standing="good" if packed else "note",
        found=f"LoRA: {', '.join(plain) or 'none'}; with a 4-bit base {', '.join(more) or 'no more'} too (estimated, "
        f"{workload.batch_size} × {workload.sequence_length} tokens a batch)",
        remedy="" if packed else "Free memory, or take a smaller model than the catalogue's.",
    )


def _fitting(variant: Variant, where: str, free: int, birth: int) -> list[str]:
    """Names of the catalogue's models that train in so many bytes, `birth` of them a process's before its model; their
    weights are not looked for."""

    def needed(name: str) -> int:
        shape = shapes.shape(catalogue.resolve(f"{catalogue.RANDOM_PREFIX}{name}"))
        return estimate_memory(variant, Workload(), shape, device=where, process_bytes=birth).needed_bytes

    return [name for name in catalogue.CATALOGUE if needed(name) <= free]

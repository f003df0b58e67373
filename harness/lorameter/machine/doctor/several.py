"""What several GPUs, several processes and several machines share: links, a GPU's own server, the folder of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lorameter.machine.doctor.check import DoctorCheck
from lorameter.machine.doctor.survey import Survey
from lorameter.machine.filesystem import IN_MEMORY, OBJECTS, FolderLocation
from lorameter.machine.gpu_topology import FAR, NVLINK, Links, Pair
from lorameter.machine.gpus import say_entries, shared_boards
from lorameter.machine.reading import unavailable

MPS_PIPES = "CUDA_MPS_PIPE_DIRECTORY"
MPS_DEFAULT = "/tmp/nvidia-mps"
MPS_SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
"""What NVIDIA's Multi-Process Service is told by: where its control daemon listens, and how much of a GPU a process
gets (docs.nvidia.com, MPS, environment variables)."""
ELSEWHERE = "Give a folder on a disk of this machine: --runs-dir, or LORAMETER_RUNS; copy the runs when they are whole."


def interconnect(found: Survey) -> Iterator[DoctorCheck]:
    """How the GPUs reach each other; of one GPU there is nothing to say."""
    links = found.links.value
    if links is None or len(links.active) < 2:
        return
    yield _ways(links)
    up = {number: count.value for number, count in links.active if count.value is not None}
    if len(set(up.values())) > 1:
        most = max(up.values())
        fewer = ", ".join(f"GPU {number} has {count}" for number, count in up.items() if count < most)
        yield DoctorCheck(
            about="spoils",
            name="NVLinks",
            standing="bad",
            found=f"{fewer} up, others {most}: ranks wait for the slowest",
            remedy="Look at nvidia-smi nvlink --status and at the GPUs' slots, or leave those GPUs out by "
            "CUDA_VISIBLE_DEVICES.",
        )


def _ways(links: Links) -> DoctorCheck:
    unknown = [pair for pair in links.pairs if not pair.through.known]
    by: dict[str, list[Pair]] = {}
    for pair in links.pairs:
        if pair.through.value is not None:
            by.setdefault(pair.through.value, []).append(pair)
    said = [f"{_named(pairs, len(links.pairs))} by {way}" for way, pairs in by.items()]
    if unknown:
        said.append(f"{_named(unknown, len(links.pairs))}: {unavailable(unknown[0].through.reason)}")
    far = any(way in FAR for way in by)
    return DoctorCheck(
        about="measures",
        name="interconnect",
        standing="note" if unknown or far or (NVLINK in by and len(by) > 1) else "good",
        found="; ".join(said),
        remedy="Give the ranks of a trial GPUs that are near each other (CUDA_VISIBLE_DEVICES), and compare runs on "
        "the same ones only."
        if unknown or far or len(by) > 1
        else "",
    )


def cards_of_ranks(found: Survey) -> Iterator[DoctorCheck]:
    """Whether each rank of a trial would have a GPU of its own."""
    shared = [say_entries(parts) for parts in shared_boards(found.visible.value or ())]
    if shared:
        yield DoctorCheck(
            about="spoils",
            name="ranks",
            standing="note",
            found=f"{'; '.join(shared)} are parts of one GPU: ranks, or sites, on them would measure each other",
            remedy="Make one instance of each GPU visible (CUDA_VISIBLE_DEVICES).",
        )


def _named(pairs: list[Pair], of: int) -> str:
    if len(pairs) == of:
        return "all GPUs"
    return "GPUs " + ", ".join(f"{pair.first} and {pair.second}" for pair in pairs)


def card_server(environment: Mapping[str, str], *, on_card: bool) -> Iterator[DoctorCheck]:
    """NVIDIA's Multi-Process Service, where trials run on a GPU: processes share a GPU's context by it."""
    pipes = Path(environment.get(MPS_PIPES) or MPS_DEFAULT)
    if not on_card or not (pipes / "control").exists():
        return
    share = environment.get(MPS_SHARE, "")
    part = f", and a process gets {share} % of a GPU" if share else ""
    yield DoctorCheck(
        about="spoils",
        name="MPS",
        standing="bad",
        found=f"its control daemon listens in {pipes}: processes share a GPU's context, and a fault of one ends all"
        f"{part}",
        remedy="echo quit | nvidia-cuda-mps-control, or set CUDA_MPS_PIPE_DIRECTORY to an empty folder.",
    )


def runs_folder(found: Survey) -> Iterator[DoctorCheck]:
    """Whether what is measured is safe where it would be written."""
    place = found.runs.value
    if place is None:
        yield DoctorCheck(about="runs", name="runs folder", standing="note", found=unavailable(found.runs.reason))
        return
    yield _judged(place)


def _judged(place: FolderLocation) -> DoctorCheck:
    where = f"{place.path} lies on {place.kind}"
    if place.locks.value is None:
        said = f"{where}; {place.locks.reason}"
    elif not place.locks.value:
        said = f"{where}, where a lock keeps nobody out: two runs would not see each other"
    elif place.kind in OBJECTS:
        said = f"{where}, an object store: what was synced is not there before its file is closed"
    elif place.kind in IN_MEMORY:
        said = f"{where}, which is memory: it takes from what trials have, and a restart ends it"
    elif place.unsynced:
        said = f"{where} with {place.unsynced}: what was synced can be lost with the machine's power"
    elif place.local_locks:
        said = f"{where} with {place.local_locks}: its locks hold on this machine alone"
    elif place.shared:
        return DoctorCheck(
            about="runs",
            name="runs folder",
            standing="note",
            found=f"{where}, which other machines may share: each record waits for a server",
            remedy="Nothing has to be done. On a disk of this machine records are written sooner.",
        )
    else:
        return DoctorCheck(about="runs", name="runs folder", standing="good", found=f"{where}; locks hold")
    return DoctorCheck(about="runs", name="runs folder", standing="bad", found=said, remedy=ELSEWHERE)

"""What kind of file system a folder lies on, and whether its locks and its writes can be trusted.

Runs are written by fsync and kept apart by locks (flock). Both are promises of the file system: over a network some
keep them for one machine alone, and some for nobody. What a mount says of itself is read; a lock is tried.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorameter.machine.reading import Reading, missing

MOUNTS = Path("/proc/self/mountinfo")
SHARED = frozenset(
    "9p afs beegfs ceph cifs fuse.ceph fuse.ceph-fuse fuse.cvmfs2 fuse.glusterfs fuse.juicefs fuse.sshfs glusterfs "
    "gpfs lustre nfs nfs4 orangefs panfs pvfs2 smb3 smbfs virtiofs vboxsf wekafs".split()
)
"""Types that several machines, or a machine and its guests, may have mounted at once."""
OBJECTS = frozenset(
    "fuse.blobfuse fuse.blobfuse2 fuse.gcsfuse fuse.goofys fuse.mountpoint-s3 fuse.rclone fuse.s3fs".split()
)
"""Object stores behind a file system: a file is there when it is closed, whatever was synced before, and locks are kept
by nobody (the projects' own pages say so: GoogleCloudPlatform/gcsfuse docs/semantics.md, awslabs/mountpoint-s3
doc/SEMANTICS.md)."""
LOCAL_LOCKS = {"nfs": ("nolock", "local_lock=flock", "local_lock=all"), "lustre": ("localflock", "noflock")}
"""Options by which the locks of a type hold on one machine alone, or not at all (nfs(5); Lustre manual, mount.lustre).
Those of nfs4 are as nfs's."""

UNSYNCED: dict[str, tuple[str, ...]] = {
    "overlay": ("volatile",),
    "ext3": ("nobarrier", "barrier=0"),
    "ext4": ("nobarrier", "barrier=0"),
    "xfs": ("nobarrier",),
    "btrfs": ("nobarrier",),
    "f2fs": ("nobarrier", "fsync_mode=nobarrier"),
}
"""Options by which a type does not wait for its disk's own cache, or for nothing (overlay), before it says that it has
written (kernel documentation: filesystems/overlayfs, ext4, f2fs; xfs(5) of before Linux 4.19, btrfs(5))."""
IN_MEMORY = frozenset(("tmpfs", "ramfs"))
"""Types that end with the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderLocation:
    """Where a folder lies."""

    path: str
    """The folder, or the nearest one above it that there is."""
    kind: str
    """Type of the file system, as the kernel names it."""
    options: tuple[str, ...]
    locks: Reading[bool]
    """Whether a lock that one holds is refused to another, tried on this machine."""

    @property
    def shared(self) -> bool:
        """Whether other machines may write there."""
        return self.kind in SHARED or self.kind in OBJECTS

    @property
    def local_locks(self) -> str:
        """The option by which locks are not those of all machines; empty where there is none."""
        known = LOCAL_LOCKS.get("nfs" if self.kind.startswith("nfs") else self.kind, ())
        return next((option for option in self.options if option in known), "")

    @property
    def unsynced(self) -> str:
        """The option by which a sync is no promise; empty where there is none."""
        known = UNSYNCED.get(self.kind, ())
        return next((option for option in self.options if option in known), "")


def place_of(folder: Path, mounts: Path = MOUNTS) -> Reading[FolderLocation]:
    """Where a folder lies, which need not exist yet; missing where the kernel does not say."""
    try:
        nearest = folder.absolute()
        while not os.path.isdir(nearest):  # noqa: PTH112 of what cannot be asked pathlib raises
            nearest = nearest.parent
        nearest = nearest.resolve()
    except OSError as error:
        return missing(f"where {folder} would lie cannot be known: {error.strerror}")
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        return missing(f"{mounts} cannot be read: {error.strerror}")
    found = [one for one in map(_mount, lines) if one is not None and nearest.is_relative_to(one[0])]
    if not found:
        return missing(f"{mounts} has no mount above {nearest}")
    longest = max(len(Path(one[0]).parts) for one in found)
    _, kind, options = [one for one in found if len(Path(one[0]).parts) == longest][-1]  # the last covers the others
    return Reading(value=FolderLocation(path=str(nearest), kind=kind, options=options, locks=_try_locks(nearest)))


def _mount(line: str) -> tuple[str, str, tuple[str, ...]] | None:
    """Mount point, type and options of a line of mountinfo (proc(5)); None of another."""
    before, dash, after = line.partition(" - ")
    fields, more = before.split(" "), after.split(" ")
    if not dash or len(fields) < 6 or len(more) < 3:
        return None
    point = fields[4]
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        point = point.replace(octal, character)
    return point, more[0], (*fields[5].split(","), *more[2].split(","))


def _try_locks(folder: Path) -> Reading[bool]:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lorameter-lock-") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            asked = os.open(held.name, os.O_RDWR)
            try:
                fcntl.flock(asked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Reading(value=True)
            finally:
                os.close(asked)
            return Reading(value=False)
    except OSError as error:
        return missing(f"no lock can be tried in {folder}: {error.strerror}")

"""The working directory and environment of a measured script: a copy of its folder, with experiment trackers off.

Several processes of one script are live at a time, each is restarted in every replicate, and each is killed before its
end. In the current folder they would overwrite the output of each other and of earlier trainings. So the folder is
copied once when the run begins, and each process works in a copy of that copy, which is removed after its trial. All
processes of a run therefore have the same files, even if the user edits them during the run.

Large files, environments and repositories are linked instead of copied; a notice names the large files. Tool caches and
lorameter's temporary folders (TMPDIR may be inside the folder) are left out. A script can still write to an absolute
path; a notice before the start names such a path if it is in the command.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import NoReturn

from lorameter.attach.launch import HOOKED, SOCKET, child_environment
from lorameter.errors import UsageError, require, shorten
from lorameter.records import fileio
from lorameter.records.fileio import is_scratch
from lorameter.records.record import Notice
from lorameter.records.units import first_few, format_bytes
from lorameter.studies.script import PYTHON, UNVERSIONED, split_command
from lorameter.studies.variant import ScriptVariant

LARGE_BYTES = 64 * 2**20
"""A larger file is probably read-only data or weights; it is linked."""
MAX_BYTES = 2**30
"""Maximum bytes that are copied for each process; a larger folder probably contains data."""
MAX_FILES = 50_000
LINKED = (".git", ".hg", ".svn", "node_modules", ".venv", "venv")
"""Folders that a script only reads."""
LEFT_OUT = ("__pycache__", ".lorameter", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints", "wandb")
OBSERVER = "lorameter.attach.script_trial:ScriptTrial"

_QUIET: Mapping[str, str] = {
    "WANDB_MODE": "disabled",
    "WANDB_DISABLED": "true",
    "COMET_MODE": "disabled",
    "DISABLE_MLFLOW_INTEGRATION": "TRUE",
    "NEPTUNE_MODE": "debug",
    "SWANLAB_MODE": "disabled",
    "CLEARML_OFFLINE_MODE": "1",
    "DVC_STUDIO_OFFLINE": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONDONTWRITEBYTECODE": "1",  # a script given by an absolute path imports from its own folder
}
"""Variables that turn trackers off; trackers that Trainer calls are also turned off in its arguments."""
_LONGEST_LINE = 4096
_WRITING = re.compile(r"[-+]{0,2}([\w.-]*\.)?(out|save|log|checkpoint|ckpt|export|result|run)[\w.-]*|-o")


def take_snapshot(folder: Path, into: Path) -> Path:
    """Copy a folder by the rules above; returns the copy.

    Raises:
        UsageError: the folder is too large to be copied for each process, or cannot be read.
    """
    entries = list(copied_files(folder))  # raises for a folder that is too large, before anything is copied
    into.mkdir(parents=True)
    for entry in entries:
        copy = into / entry.relative_to(folder)
        if _is_linked(entry):
            target = Path(os.path.realpath(entry))  # of circular links, one of the links
            inside = entry.is_symlink() and not _leads_out(entry, folder)
            copy.symlink_to(os.path.relpath(target, os.path.realpath(entry.parent)) if inside else target)
        elif entry.is_dir():
            copy.mkdir()
        else:
            shutil.copy2(entry, copy)
    return into


def copied_files(folder: Path) -> Iterator[Path]:
    """The subfolders and files that are copied, and the entries that are linked, parents first.

    Raises:
        UsageError: the folder is too large to be copied, or cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise UsageError(
            f"cwd = {str(folder)!r}: {error.filename}: {error.strerror}, and each process works in a copy. Make it "
            "readable, or name the script's own folder as cwd."
        ) from None

    files = size = 0
    for place, folders, names in os.walk(folder, onerror=refuse):
        entries = [entry for name in (*folders, *names) if not _is_left_out(entry := Path(place, name))]
        folders[:] = [entry.name for entry in entries if entry.is_dir() and not _is_linked(entry)]
        copied = [entry for entry in entries if entry.is_file() and not _is_linked(entry)]
        files, size = files + len(copied), size + sum(entry.stat().st_size for entry in copied)
        require(
            files <= MAX_FILES and size <= MAX_BYTES,
            f"cwd = {str(folder)!r}: over {MAX_FILES} files or {format_bytes(MAX_BYTES)} below it, and each "
            "process works in a copy. Name the script's own folder as cwd, and move data out of it.",
        )
        yield from entries


def _is_left_out(entry: Path) -> bool:
    """Whether an entry is neither copied nor linked: tool caches, pipes, and temporary folders."""
    special = not (entry.is_symlink() or entry.is_dir() or entry.is_file())
    return entry.name in LEFT_OUT or special or (not entry.is_symlink() and is_scratch(entry))


def _is_linked(entry: Path) -> bool:
    """Whether an entry is linked, because it is a link, too large, an environment or a repository."""
    if entry.is_symlink() or entry.name in LINKED or (entry / "pyvenv.cfg").is_file():
        return True
    return entry.is_file() and entry.stat().st_size > LARGE_BYTES


def _leads_out(link: Path, folder: Path) -> bool:
    """Whether the target of a link is outside the copy of this folder."""
    target, root = Path(os.path.realpath(link)), Path(os.path.realpath(folder))
    return not target.is_relative_to(root) or bool(set(LEFT_OUT) & set(target.relative_to(root).parts))


def working_folder(variant: ScriptVariant, current: Path) -> Path:
    """The folder of a variant's command. Raises `UsageError` if it does not exist."""
    folder = current / variant.cwd
    require(
        fileio.is_folder(folder),
        f"variant {variant.name!r}: cwd = {shorten(repr(variant.cwd))}: no folder {shorten(str(folder))}. Correct the "
        "path.",
    )
    return folder.resolve()


def script_environment(
    variant: ScriptVariant,
    inherited: Mapping[str, str],
    *,
    scratch: Path,
    threads: int,
    port: int,
    socket: str,
    side: str = "",
) -> dict[str, str]:
    """The environment of a script's process: the inherited one, without trackers, with its own caches and port.

    Args:
        variant: its `env` overrides all variables except those that the harness needs.
        inherited: variables of its side.
        scratch: its folder for caches.
        threads: CPU threads, unless the user's environment or the variant sets them.
        port: a free port, at which its ranks connect.
        socket: name of the socket from which it gets its turns.
        side: the interpreter that a side of an A/B names; "" for none.
    """
    own = {
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "MLFLOW_TRACKING_URI": f"file://{scratch}/mlflow",
        "TENSORBOARD_LOGGING_DIR": str(scratch / "tensorboard"),
    } | dict.fromkeys(("MASTER_PORT", "PET_MASTER_PORT"), str(port))
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name not in inherited}
    merged = {**inherited, **limits, **_QUIET, **own, **variant.env}
    if in_front := variant.python or side:
        merged["PATH"] = os.pathsep.join([str(PurePath(in_front).parent), merged.get("PATH", "")])
    variables = {SOCKET: socket, HOOKED: str(scratch / "hooked")}
    return child_environment(merged, variables, observer=OBSERVER)


def resolve_command(
    variant: ScriptVariant, python: str, variables: Mapping[str, str], folder: Path, *, origin: Path, side: str = ""
) -> list[str]:
    """The command's words with the program resolved.

    Args:
        variant: the variant with the command.
        python: the interpreter for the word python.
        variables: its environment.
        folder: where it is started.
        origin: the folder from which this one was copied; paths that lead out of it are relative to it.
        side: the interpreter that a side of an A/B names; a launcher from another environment runs in it.

    Raises:
        UsageError: the program or the script does not exist.
    """
    where = f"variant {variant.name!r}: command = {shorten(repr(variant.command))}"
    words = _resolve_words(split_command(f"variant {variant.name!r}", variant.command), origin)
    require(
        not variant.python or os.access(variant.python, os.X_OK),
        f"variant {variant.name!r}: python = {variant.python!r}: no executable file. Name ENVIRONMENT/bin/python.",
    )
    if words[0] in UNVERSIONED or (variant.python and PYTHON.fullmatch(words[0])):
        words[0] = variant.python or python
    elif program := shutil.which(folder / words[0] if os.sep in words[0] else words[0], path=variables.get("PATH")):
        words[:1] = [side, str(program)] if side and _is_of_another(str(program), side) else [str(program)]
    else:
        raise UsageError(f"{where}: no program {shorten(repr(words[0]))} on PATH. Install it, or write its path.")
    if PYTHON.fullmatch(PurePath(words[0]).name) and words[1:] and not words[1].startswith("-"):
        require(
            fileio.is_there(folder / words[1]),
            f"{where}: no file {shorten(repr(words[1]))} in {folder}. Name its folder as cwd, or correct the path.",
        )
    return words


def _resolve_words(words: Sequence[str], origin: Path) -> list[str]:
    """The words; a relative path to something outside of the folder becomes absolute, since it would be invalid in the
    copy. An output path stays relative, so that the output is written near the copy."""
    resolved = []
    for before, word in zip(["", *words[:-1]], words, strict=True):
        option, equals, value = word.rpartition("=")
        written = _WRITING.fullmatch(option if equals else before)
        leads = value.startswith("..") and not written and (origin / value).exists()
        resolved.append(f"{option}{equals}{os.path.normpath(origin / value)}" if leads else word)
    return resolved


def _is_of_another(program: str, side: str) -> bool:
    """Whether a program is a Python script installed by another environment: its first line would start that
    environment's interpreter. pip writes it as two shell lines if the path is long or has blanks."""
    if PurePath(program).parent == PurePath(side).parent:
        return False
    try:
        with Path(program).open("rb") as file:
            first, second = file.readline(_LONGEST_LINE), file.readline(_LONGEST_LINE)
    except OSError:
        return False
    return first.startswith(b"#!") and (b"python" in first or second.startswith(b"'''exec'"))


def shared_notices(variant: ScriptVariant, current: Path) -> Iterator[Notice]:
    """Notices about files that the processes of this script share, as far as its folder and its command show.

    Raises:
        UsageError: the folder, program or script does not exist, or the folder is too large.
    """
    folder = working_folder(variant, current)
    words = resolve_command(variant, "python", os.environ, folder, origin=folder)
    entries = list(copied_files(folder))
    large = [entry for entry in entries if not entry.is_symlink() and entry.is_file() and _is_linked(entry)]
    escaping_links = [one for one in entries if one.is_symlink() and _leads_out(one, folder)]
    if shared := sorted(str(entry.relative_to(folder)) for entry in (*large, *escaping_links)):
        yield Notice(
            code="files-shared",
            message=f"{variant.name}: {first_few(shared, 3)} are not copied: they are larger than "
            f"{format_bytes(LARGE_BYTES)}, or links that lead out of the folder. A script that writes into one of them "
            "writes into the original.",
            remedy="Nothing to do where it only reads them; else move them out of its folder.",
        )
    written = [word for option, word in _options(words) if _WRITING.fullmatch(option)]
    outside = [word for word in written if PurePath(word).is_absolute() or word.startswith(("..", "~"))]
    if outside:
        yield Notice(
            code="writes-outside",
            message=f"{variant.name}: {first_few(outside, 3)} is outside of its folder, and all of its processes "
            "write there. Trainer saves and reports nothing while it is measured; what the script itself writes "
            "before its training ends is not suppressed.",
            remedy="Give the script a relative path: it then writes into a copy that is thrown away.",
        )


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option.startswith("-") or equals:  # Hydra options have no dashes
            yield option, value if equals else following

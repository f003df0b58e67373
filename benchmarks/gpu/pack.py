"""Packs the libraries for a machine with a GPU and no network, and unpacks its results.

    python -m benchmarks.gpu.pack                     fills .gpu/site; copy .gpu, with .gpu/state, to the GPU machine
    python -m benchmarks.gpu.pack --take FILE         unpacks the results of a call for the next call

On the GPU machine, in the root of the checkout: `make gpu GPU_OPTIONS='--minutes 9.5'`, or without make
`python3 -m benchmarks.gpu --minutes 9.5`.
Here, after each call: `--take` its campaign.tar.gz, and call again until no step remains.

The packages are those of `carried.txt`, as wheels for the GPU machine's Python; bitsandbytes has only the libraries
for that CUDA version and for CPUs. The project itself is the checkout, with metadata next to it, since the GPU machine
builds nothing.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKED = ROOT / ".gpu"
CARRIED = Path(__file__).with_name("carried.txt")
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
MAX_PACKED_BYTES = 8 * 2**20
"""The largest file in an archive; tokens and long recordings are larger and can be regenerated."""


def main(arguments: list[str] | None = None) -> int:
    """Pack the libraries, or unpack results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python-version", default="3.12", metavar="V", help="Python of the GPU machine; default: 3.12"
    )
    parser.add_argument("--cuda", default="130", metavar="V", help="CUDA of its torch; default: 130")
    parser.add_argument("--take", type=Path, metavar="FILE", help="unpack this campaign.tar.gz of a call")
    options = parser.parse_args(arguments)
    if options.take:
        print(*unpack_results(options.take, ROOT), sep="\n")
        return 0
    pack(PACKED, python_version=options.python_version, cuda=options.cuda)
    print(f"packed into {PACKED}: copy it with the checkout")
    return 0


def pack(folder: Path, *, python_version: str, cuda: str) -> None:
    """Fill `folder/site` from scratch. Raises CalledProcessError where pip cannot download a package, and
    FileNotFoundError where bitsandbytes has no library for this version of CUDA."""
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:",
         "--python-version", python_version, "--implementation", "cp", *platforms, "--target", str(site),
         "--requirement", str(CARRIED)],
        check=True,
    )  # fmt: skip
    wanted = f"libbitsandbytes_cuda{cuda}.so"
    if not (site / "bitsandbytes" / wanted).exists():
        raise FileNotFoundError(f"bitsandbytes has no {wanted}: give the CUDA of the other torch with --cuda")
    for library in (site / "bitsandbytes").glob("libbitsandbytes_*.so"):
        if library.name not in (wanted, "libbitsandbytes_cpu.so"):
            library.unlink()
    for tests in sorted(site.rglob("tests"), reverse=True):
        shutil.rmtree(tests)
    write_metadata(site)


def write_metadata(site: Path) -> None:
    """Write the project's metadata and entry points without its code, so that pytest finds the plugin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = site / f"{project['name']}-{project['version']}.dist-info"
    folder.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (folder / "METADATA").write_text(metadata, encoding="utf-8")
    points = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [
        line for group, found in points.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in found.items()))
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "RECORD").write_text("", encoding="utf-8")


def pack_results(out: Path, state: Path, reports: Path, page: Path) -> Path:
    """Pack the state, the reports and the page of a call; return the archive."""
    archive = out / "campaign.tar.gz"
    places = {".gpu/state": state, f"docs/{page.name}": page}
    places |= {f"reports/{folder.name}": folder for folder in reports.glob("*_gpu")}
    with tarfile.open(archive, "w:gz") as file:
        for name, place in places.items():
            file.add(place, arcname=name, filter=lambda member: member if member.size <= MAX_PACKED_BYTES else None)
    return archive


def unpack_results(archive: Path, root: Path) -> list[str]:
    """Unpack an archive of `pack_results` into a checkout and return the names of its files."""
    with tarfile.open(archive) as file:
        file.extractall(root, filter="data")
        return [member.name for member in file.getmembers() if member.isfile()]


if __name__ == "__main__":
    sys.exit(main())

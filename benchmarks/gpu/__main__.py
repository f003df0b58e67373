"""``python -m benchmarks.gpu``: starts the campaign with installed or packed libraries.

Libraries for a machine without a network are in a folder of the checkout (`benchmarks.gpu.pack`), which must be on the
path before any import of the harness, here and in every process that starts from here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = ROOT / ".gpu" / "site"
PROJECT = "lorameter"


def packed(site: Path = SITE, project: str = PROJECT) -> Path | None:
    """Return the packed folder if it is needed. An installed project, as on the packing machine, has installed
    libraries, and the packed ones are for another interpreter."""
    try:
        distribution(project)
    except PackageNotFoundError:
        return site if site.is_dir() else None
    return None


def variables_of(environment: Mapping[str, str], site: Path | None) -> dict[str, str]:
    """Return the environment of the steps' processes, which is offline with a packed folder."""
    variables = {**environment, "PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT / "harness"), str(ROOT)]
    if site is not None:
        paths.insert(0, str(site))
        variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (*paths, variables.get("PYTHONPATH", ""))))
    return variables


def main() -> int:
    """Put the packed folder on the path, then start the campaign."""
    site = packed()
    if site is not None:
        sys.path.insert(0, str(site))
    from benchmarks.gpu import campaign

    return campaign.main(variables_of(os.environ, site))


if __name__ == "__main__":
    sys.exit(main())

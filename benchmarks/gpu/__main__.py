"""``python -m benchmarks.gpu``: starts the campaign with installed or packed libraries.

Libraries for a machine without a network are in a folder of the checkout (`benchmarks.gpu.pack`), which must be on the
path before any import of the harness, here and in every process that starts from here. Where the project is installed,
as on the packing machine, its libraries are used, since the packed ones are for another interpreter.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = ROOT / ".gpu" / "site"


def main() -> int:
    """Put the checkout, and the packed folder if it is needed, on the path; then start the campaign."""
    paths, variables = [str(ROOT / "harness"), str(ROOT)], {**os.environ, "PYTHONUNBUFFERED": "1"}
    try:
        distribution("lorameter")
    except PackageNotFoundError:
        if SITE.is_dir():
            paths.insert(0, str(SITE))
            variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[:0] = paths
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (*paths, os.environ.get("PYTHONPATH"))))
    from benchmarks.gpu import campaign

    return campaign.main(variables)


if __name__ == "__main__":
    sys.exit(main())

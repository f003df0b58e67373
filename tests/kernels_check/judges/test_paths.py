"""The paths are joined from their judges: each is exported once, and says what it takes to judge it."""

import subprocess
import sys

from kernels_check.judges import adapter, attention, base, batch, execution, optimizer, ranks, trained
from kernels_check.judges.paths import PATHS, REQUIREMENTS

JUDGES = (attention, batch, base, adapter, trained, optimizer, execution, ranks)


def test_no_path_is_exported_twice():
    """One judge would silently replace the other."""
    assert sum(len(judge.PATHS) for judge in JUDGES) == len(PATHS)
    assert list(REQUIREMENTS) == list(PATHS)


def test_the_judges_load_no_torch():
    """A requirement is refused before anything heavy is imported."""
    code = "import sys; from kernels_check.judges import paths; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""Tests of `import lorameter.stats`: its exports and its cost."""

import subprocess
import sys


def test_import_is_cheap():
    """Importing the package with all its exports loads neither numpy nor scipy."""
    program = (
        "import sys; import lorameter.stats as stats; [getattr(stats, name) for name in stats.__all__]; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'numpy', 'scipy', 'torch', 'pandas'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

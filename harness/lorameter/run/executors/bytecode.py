"""A script that any Python can run: write the bytecode of the modules in some folders, each whole or not at all.

Where a disk takes a part of a file only, Python leaves that part in the place of the module's bytecode (python/cpython
issue 126606, mended in 3.12.8 and 3.13.1), and nothing that imports the module can be started again. So what was
written is read once more, and what is not whole is removed.
"""

import compileall
import contextlib
import importlib.util
import marshal
import sys
from pathlib import Path

HEADER = 16
"""Bytes in front of the code (PEP 552)."""


def write(folder: Path) -> None:
    """Bytecode for each module that has none yet, or an old one."""
    compileall.compile_dir(str(folder), quiet=2)
    for source in folder.rglob("*.py"):
        with contextlib.suppress(OSError):
            bytecode = Path(importlib.util.cache_from_source(str(source)))
            try:
                marshal.loads(bytecode.read_bytes()[HEADER:])
            except (EOFError, ValueError, TypeError):
                bytecode.unlink()


if __name__ == "__main__":
    for each in sys.argv[1:]:
        write(Path(each))

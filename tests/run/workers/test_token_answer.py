"""The answer of the tokenising process is separate from what libraries print."""

from __future__ import annotations

import os

import pytest

from lorameter.run.workers.local import LocalExecutor


@pytest.mark.parametrize("where", ["sitecustomize", "tokenizers"])
def test_what_a_library_prints_is_no_answer(where, tmp_path, monkeypatch, small_study):
    """At the start, when it is imported, and at the very end: it goes to the log, and the tokens are prepared."""
    noisy = tmp_path / "path"
    noisy.mkdir()
    noise = (
        "import atexit, os, sys\nprint('noise', end='')\nos.write(1, b'loud')\n"
        "if 'lorameter.worker' in sys.orig_argv: atexit.register(lambda: (print('[]'), os.write(1, b'bye\\n')))\n"
    )
    if where == "sitecustomize":
        (noisy / "sitecustomize.py").write_text(noise)
    else:
        (noisy / "sitecustomize.py").write_text(
            "import sys\nclass Noisy:\n    def find_spec(self, name, path=None, target=None):\n"
            f"        if name == 'tokenizers':\n            exec({noise!r}, {{}})\nsys.meta_path.insert(0, Noisy())\n"
        )
    monkeypatch.setenv("PYTHONPATH", f"{noisy}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    local = LocalExecutor()
    local.start(tmp_path, 1)
    try:
        assert local.prepare_tokens(small_study.workload).synthetic
    finally:
        local.close()
    assert "loud" in (tmp_path / "logs" / "tokens.log").read_text() or where == "sitecustomize"

"""Records the two stored runs again: `python tests/contract/make_runs.py`, about five minutes on two cores.

Each is one real `lorameter run` of study.toml. Manifest, records and the evidence of the checks are stored as the
harness wrote them; only the run's id becomes "base" or "candidate", so that the expected files do not change with the
date. Logs are left out. Afterwards update the expected files: `LORAMETER_CONTRACT=write pytest tests/contract`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
STORED = HERE / "runs"


def record(name: str, folder: Path) -> None:
    """Measure the study and store the run under `name`."""
    lorameter = str(Path(sys.executable).with_name("lorameter"))
    runs = folder / name
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAMETER_")}
    environment |= {"LORAMETER_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [lorameter, "run", str(HERE / "study.toml"), "--runs-dir", str(runs), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
    (written,) = (path for path in runs.iterdir() if path.is_dir())
    shutil.rmtree(STORED / name, ignore_errors=True)
    (STORED / name).mkdir(parents=True)
    for file in ("trials.jsonl", "checks.jsonl"):
        shutil.copyfile(written / file, STORED / name / file)
    text = (written / "manifest.json").read_text(encoding="utf-8").replace(written.name, name)
    assert json.loads(text)["run"] == name
    (STORED / name / "manifest.json").write_text(text.replace(str(folder), "/tmp"), encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("base", "candidate"):
            record(name, Path(temporary))

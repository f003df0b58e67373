"""Is a copied head found without being told, and its cost what mending it gains?

    python benchmarks/selftest/copied_head.py [--hidden 64] [--words 262144] [--effort standard]

A model with random weights of many words is trained by PEFT and answers requests. `lorameter profile --phase generate`
takes them apart and tries the remedy of what it finds to be the dearest, of which nothing here tells it. The cost is a
share of the time to first token, and so is the gain (`forecasts.py`); it holds where the cost lies within a tenth of
the gain, for the whole interval of that.

Exit status 1 unless the finding is there and its cost within a tenth of the gain: also where the interval is too wide
to tell.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from forecasts import document_of, judge_document, machine_words
from many_words import write_model

WITHIN = 0.10
"""By how much of the gain a cost may miss it."""
CODE = "weight-copied"
STUDY = """
title = "a head of many words"

[workload]
model = "random:{model}"
sequence_length = 32
batch_size = 1
train_sequences = 4
held_out_records = 4
held_out_sequences = 1
prompt_tokens = 32
new_tokens = 4

[[variant]]
name = "many-words"
r = 4
"""


def main() -> int:
    """Profile, have the remedy tried, and print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--words", type=int, default=262144)
    parser.add_argument("--effort", choices=("quick", "standard", "rigorous"), default="standard")
    options = parser.parse_args()
    print(f"{machine_words()}; {options.words} words of {options.hidden} numbers", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        document = document_of(arguments(write_study(Path(folder), options.hidden, options.words), options.effort))
    return 1 if document is None else judge_document(document, CODE, "the time to first token", near_a_tenth)


def near_a_tenth(gain: float) -> tuple[float, float]:
    """Within a tenth of it; of none at all nothing is."""
    return (1 - WITHIN) * gain, (1 + WITHIN) * gain


def write_study(folder: Path, hidden: int, words: int) -> Path:
    """A study of one variant of such a model."""
    study = folder / "many-words.toml"
    study.write_text(STUDY.format(model=write_model(folder, hidden, words)), encoding="utf-8")
    return study


def arguments(study: Path, effort: str) -> Sequence[str]:
    """Of `lorameter`: what it is to look for is not among them."""
    runs = str(study.parent / "runs")
    return ("profile", str(study), "--phase", "generate", "--effort", effort, "--runs-dir", runs, "--json", "--try")


if __name__ == "__main__":
    sys.exit(main())

"""Study files with arbitrary content: each is read or refused with exit code 2."""

from __future__ import annotations

import json
import re

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorameter.cli import main
from lorameter.studies.study_file import builtin_studies

LINES = builtin_studies()["lora-or-qlora"].read_text(encoding="utf-8").splitlines()
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=4)
VALUES = st.recursive(
    st.booleans() | st.integers(-5, 9) | st.integers() | st.floats() | TEXTS | st.sampled_from(["nf4", "float32", "r"]),
    lambda values: st.lists(values, max_size=3),
)


@st.composite
def studies(draw):
    """A built-in study in which some keys have another value, another name, or are gone."""
    lines = list(LINES)
    keys = [place for place, line in enumerate(LINES) if " = " in line]
    for place in draw(st.sets(st.sampled_from(keys), min_size=1)):
        key, _, value = lines[place].partition(" = ")
        value = draw(st.just(value) | VALUES.map(lambda value: json.dumps(value, ensure_ascii=False)))
        lines[place] = draw(st.sampled_from([f"{key} = {value}", f"{key} = {value}", f"{key}s = {value}", ""]))
    return re.sub(r"NaN|-?Infinity", "nan", "\n".join(lines)).encode()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=studies() | st.binary(max_size=60))
def test_any_study_file_is_read_or_refused(tmp_path, capsys, content):
    """`lorameter list variants FILE` ends with 0, or with 2 and a message."""
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    code = main(["list", "variants", str(path)])
    assert code in (0, 2)
    assert (code == 2) == bool(capsys.readouterr().err)

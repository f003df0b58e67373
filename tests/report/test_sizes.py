"""`lorameter list sizes`: what each variant of a study trains, without a weight."""

import re

import pytest

from lorameter import cli


def test_sizes_are_listed_for_every_setting(capsys):
    """Setting, exact parameters, share of the base, and bytes in MiB, on the study's own model."""
    assert cli.main(["list", "sizes", "lora-or-qlora"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "qlora-nf4-r64-a16" in line)
    # 4 layers; q, o 256 + 256 and k, v 256 + 128 each, gate, up, down 256 + 704 each: 4 × 64 × 4672.
    assert re.split(r"\s{2,}", row)[1:4] == ["1,196,032", "38.393 %", "4.56"]
    assert "3,115,264 parameters in the base" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "sizes"], "list sizes: no study named"),
        (["list", "sizes", "lora-or-qora"], "Did you mean 'lora-or-qlora'"),
        (["list", "sizes", "lora-or-qlora", "--model", "mistral-8b"], "Did you mean mistral-7b"),
    ],
)
def test_what_cannot_be_counted_is_bad_input(capsys, arguments, words):
    """No study, an unknown study and an unknown model are exit code 2 with what would be right."""
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err

"""Tests of where replicates are measured: options of a study or the command line, and refused values."""

from __future__ import annotations

import pytest

from lorameter.errors import UsageError
from lorameter.studies.placement import SiteSpec, SlurmRequest, read_slurm
from lorameter.studies.study_file import load_study

STUDY = """
title = "t"
[protocol]
{protocol}
[[variant]]
name = "plain"
"""


def written(tmp_path, protocol, more=""):
    path = tmp_path / "small.toml"
    path.write_text(STUDY.format(protocol=protocol) + more)
    return str(path)


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ('on = "slurm:nodes=2"', r"small.toml, \[protocol\]: .*on = 'slurm:nodes=2': 'nodes' is not known"),
        ('on = "k8s"', "on = 'k8s': not known. Use here, ray"),
        ('on = ""', "on = '': not known"),
        ('on = "slurm:sites=2"\nsites = ["0"]', "Write sites=N in it"),
        ('sites = ["a"]', "sites = 'a': numbers .* are expected"),
        ("sites = [0]", r"sites\[0\] = 0: str is expected"),
        ('sites = ["0", "0"]', "sites = '0,0': one is named twice"),
        ('on = "ray"\nsites = ["n1", "n1"]', "sites = 'n1,n1': one is named twice"),
        ('on = "ray"\nsites = [""]', "has no name"),
        ('sites = ["0,1"]', "sites = '0,1': numbers"),
        ('sites = ["0+"]', r"sites = '0\+': numbers"),
        ('sites = ["0+1", "1+2"]', r"sites = '0\+1,1\+2': one is named twice"),
    ],
)
def test_invalid_places_are_refused_on_reading(tmp_path, protocol, words):
    """The error names file, key, value and remedy before anything is started."""
    with pytest.raises(UsageError, match=words):
        load_study(written(tmp_path, protocol))


@pytest.mark.parametrize("line", ['protocol.on = "ray"', 'protocol.sites = ["0"]'])
def test_a_profile_cannot_set_the_place(tmp_path, line):
    """A profile cannot set the place, because the device that is found selects the profile."""
    with pytest.raises(UsageError, match=r"\[profile.cpu\]: protocol.(on|sites) = .*Write it in \[protocol\]"):
        load_study(written(tmp_path, "", f'[profile.cpu]\ndevices = ["cpu"]\n{line}\n'))


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({}, SiteSpec(on="ray", sites=("n1", "n2"))),
        ({"sites": "n3, n4"}, SiteSpec(on="ray", sites=("n3", "n4"))),
        ({"on": "slurm:sites=2"}, SiteSpec(on="slurm:sites=2")),
        ({"on": "here"}, SiteSpec()),
        ({"on": "here", "sites": "0,1"}, SiteSpec(sites=("0", "1"))),
    ],
)
def test_the_command_line_wins(tmp_path, options, place):
    """The command line overrides the study; a new place drops the sites of the old one."""
    study = load_study(written(tmp_path, 'on = "ray"\nsites = ["n1", "n2"]'))
    assert study.with_overrides(**options).protocol.place == place


def test_options_of_slurm_are_keys_and_values():
    """A value may hold commas; unknown keys are passed to sbatch."""
    jobs = read_slurm("slurm:sites=4,partition=gpu,gres=gpu:1,exclude=n1,n2,time=90")
    assert jobs.sites == 4
    assert jobs.parameters == {"partition": "gpu", "gres": "gpu:1", "exclude": "n1,n2", "time": 90}
    assert read_slurm("slurm") == SlurmRequest(on="slurm")
    assert read_slurm("slurm:").parameters == {}


@pytest.mark.parametrize(
    ("on", "words"),
    [
        ("slurm:nodes=2", "'nodes' is not known. Use KEY=VALUE of sites, partition"),
        ("slurm:gpu", "'gpu' is not known"),
        ("slurm:sites=0", "sites='0': a positive number"),
        ("slurm:sites=1000", "1 to 999"),
        ("slurm:time=1h", "time='1h': a positive number"),
        ("slurm:partition=", "partition='': a text"),
        ("slurm:partition=a\n", "a text"),
        ("slurm:sites=1,sites=2", "sites is given twice"),
        ("slurm:time=nan", "a positive number"),
    ],
)
def test_invalid_keys_and_values_are_refused(on, words):
    """The error lists the known keys."""
    with pytest.raises(UsageError, match=words):
        read_slurm(on)

"""A command as it is written down: whatever sounds like a credential is left out, and nothing else."""

import pytest

from harness.attach.command import write_command
from harness.errors import UsageError
from harness.studies.variant import Variant

SECRET = "hf_abcdef"


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", SECRET],
        [f"--hub_token={SECRET}"],
        [f"hub_token={SECRET}"],
        ["env", f"HF_TOKEN={SECRET}", "python"],
        ["--wandb-api-key", SECRET],
    ],
)
def test_a_credential_is_not_written_and_no_study_takes_it(words):
    """Behind an option, as a field of Hydra's, as a variable; a study's command would be written into each run."""
    assert SECRET not in write_command(["python", "train.py", *words])
    with pytest.raises(UsageError, match="inherit the credentials of your environment") as refused:
        Variant(name="a", command=" ".join(["python", "train.py", *words]))
    assert SECRET not in str(refused.value)
    Variant(name="a", command=write_command(["python", "train.py", *words]))  # as a wrapped one is kept


@pytest.mark.parametrize("option", ["--pad_token", "--eos-token", "--max_new_token", "--image-token", "--tokenizer"])
def test_tokens_of_a_vocabulary_are_no_credentials(option):
    """Trainers have options for them."""
    words = ["python", "train.py", option, "x"]
    assert write_command(words) == f"python train.py {option} x"
    assert Variant(name="a", command=" ".join(words)).command

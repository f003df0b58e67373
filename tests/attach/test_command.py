"""Tests of the stored command: anything that looks like a credential is removed, and nothing else."""

import shlex

import pytest

from lorameter.attach.launch import write_command
from lorameter.cli import main
from lorameter.errors import UsageError
from lorameter.studies.script import split_command
from lorameter.studies.variant import ScriptVariant

WORDS = [
    ["--hub_token", "hunter2"],
    ["hub_token=hunter2"],
    ["env", "HF_TOKEN=hunter2", "python"],
    ["--wandb-api-key", "hunter2"],
    ["https://user:hunter2@host/x"],
    ["https://host/x?rev=1&X-Amz-Signature=hunter2"],
    ["git+ssh://git:p%40hunter2@host/x"],
    ["sh", "-c", "python t.py --hub_token hunter2 && ls"],
    ["sh", "-c", "HF_TOKEN=$'hunter2' python t.py"],
    ["sh", "-c", 'curl -d "{\\"token\\": \\"hunter2\\"}" host'],
    ["sh", "-c", "python t.py --hub_token \\\n  hunter2"],
    ["--header", "Authorization: AWS4-HMAC-SHA256 Credential=x/y, Signature=hunter2"],
    ["--config", '{"hub": {"token": "hunter2", "push": true}}'],
    ["--config", "{token: hunter2}"],
    ["-c", "login(token=f'hunter2')"],
    ["-c", 'os.environ["HF_TOKEN"]="hunter2"'],
    ["hf_hunter2hunter2hunter2"],
    ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.hunter2hunter2"],
    ["--password=a;b|c,hunter2"],
    ["env", "DB_PASS=hunter2"],
]


@pytest.mark.parametrize("words", WORDS)
def test_a_credential_is_not_written_and_no_study_takes_it(words):
    """Credentials are recognised in options, Hydra fields, variables, addresses, shell lines, headers, JSON, programs,
    and by their own format. A study's command would be stored in each run."""
    line = ["python", "train.py", *words]
    written = write_command(line)
    assert "hunter2" not in written
    with pytest.raises(UsageError, match="inherit the credentials of your environment") as refused:
        ScriptVariant(name="a", command=shlex.join(line))
    assert "hunter2" not in str(refused.value)
    assert ScriptVariant(name="a", command=written).command == written


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "https://host:8080/x?revision=2"],
        ["git+ssh://git@github.com/x/y"],
        ["sh", "-c", "python t.py --hub_token $HF_TOKEN"],
        ["--use_auth_token", "True", "--no-auth", "x"],
        ["--hub_token=None"],
        ["--config", '{"push_token": null, "tokenizer": "x", "pad_token": "</s>"}'],
        ["--author", "me", "--max_tokens", "5"],
        ["-c", "token = os.environ['HF_TOKEN']"],
        ["-c", "os.environ['HF_TOKEN'] = os.environ['OTHER']"],
        ["--hub_token", "--push"],
        ["--forward_pass", "3", "--pwd", "/work", "--bypass=1"],
        ["--run_name", "sk-baseline-lora-r16-alpha32"],
    ],
)
def test_arguments_without_a_credential_are_accepted(words):
    """Host and port, a query, an SSH key file, a variable name, a switch and a vocabulary token are accepted."""
    assert ScriptVariant(name="a", command=shlex.join(["python", "train.py", *words])).command


@pytest.mark.parametrize("value", ["http://user:hunter2@proxy:3128", '{"token": "hunter2"}'])
def test_a_variable_of_a_study_is_read_by_the_same_rule(value):
    """The variables in `env` are stored in the run as well."""
    with pytest.raises(UsageError, match=r"env\.SOME: ") as refused:
        ScriptVariant(name="a", command="python train.py", env={"SOME": value})
    assert "hunter2" not in str(refused.value)


def test_an_invalid_command_is_refused_without_showing_its_credential():
    """The error repeats the command without the credential."""
    for line in ("HF_TOKEN=hunter2 python t.py", "python t.py --hub_token hunter2 | tee", "a 'b --auth=hunter2"):
        with pytest.raises(UsageError) as refused:
            split_command("variant", line)
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("option", ["--base-command", "--candidate-command", "--command"])
def test_no_option_takes_a_command_with_a_credential(option, tmp_path, capsys):
    """Commands of either side of an A/B, or of both, are refused before anything is started or written."""
    words = {"--base-command": "true", "--candidate-command": "true"} if option != "--command" else {}
    words |= {option: "python t.py https://user:hunter2@host/x"}
    sides = ["--base", "HEAD", "--candidate", "HEAD"] if option == "--command" else []
    flat = [word for pair in words.items() for word in pair]
    assert main(["ab", *sides, *flat, "--json", "--runs-dir", str(tmp_path / "runs")]) == 2
    printed = "".join(capsys.readouterr())
    assert "reads like a credential" in printed
    assert "hunter2" not in printed
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
